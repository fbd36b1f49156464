"""Images → code shards: one code shard an image shard, each rank its own, nothing done twice after a restart."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ibq_scale.data.codes import CodeShard, code_shard_name, find_code_shard, finish_codes, write_code_shard
from ibq_scale.data.manifest import CodesInfo, ShardInfo, load_manifest
from ibq_scale.data.store import open_store
from ibq_scale.data.stream import shard_images, to_float
from ibq_scale.distributed.environment import World
from ibq_scale.errors import UserError
from ibq_scale.pretrained.loading import Tokenizer, load_tokenizer
from ibq_scale.quantize.usage import CodeUsage


@dataclass(frozen=True)
class TokenizeReport:
    """What was written. `usage` (0 to 1) and `perplexity` are over the images of the shards written now."""

    url: str
    images: int
    shards: int
    reused_shards: int
    grid: tuple[int, int]
    codebook_size: int
    tokenizer: str
    usage: float
    perplexity: float
    seconds: float
    images_per_s: float


def tokenize(checkpoint: str | Path, data: str, to: str, world: World, *, batch: int) -> TokenizeReport:
    """Encodes every image (centre crop at the tokenizer's resolution) and writes shards, then the manifest. Collective.

    Rank r takes shards r, r + W, …; a shard that an earlier run of the same tokenizer on the same images has left
    is kept. UserError where the checkpoint or the data cannot be used.
    """
    begin = time.perf_counter()
    manifest = load_manifest(data, "images")
    tokenizer = load_tokenizer(checkpoint, world.device)
    resolution = tokenizer.model_config.resolution
    side = resolution // tokenizer.downsampling
    info = CodesInfo(
        codebook_size=tokenizer.quantizer_config.codebook_size,
        grid=(side, side),
        tokenizer=tokenizer.hash,
        source=manifest.hash,
    )
    store = open_store(to)
    if store.url == open_store(data).url:
        raise UserError(f"--to {to} is the folder of the images: give the codes one of their own")
    usage = CodeUsage(info.codebook_size, world.device)
    mine: dict[int, ShardInfo] = {}
    reused = 0
    for number in range(world.rank, len(manifest.shards), world.size):
        name = code_shard_name(manifest.shards[number].name)
        found = find_code_shard(store, name, info, manifest.shards[number].samples)
        reused += found is not None
        mine[number] = found or write_code_shard(store, name, _encode(tokenizer, data, number, batch, usage), info)
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, (mine, reused))
    shards = dict(sorted((k, v) for part, _ in gathered for k, v in part.items()))
    reused = sum(count for _, count in gathered)
    if world.is_main:
        finish_codes(store, list(shards.values()), manifest.classes, info)
    usage.reduce()
    seconds = time.perf_counter() - begin
    encoded = sum(manifest.shards[n].samples for part, _ in gathered for n in part)
    return TokenizeReport(
        url=store.url,
        images=manifest.samples,
        shards=len(shards),
        reused_shards=reused,
        grid=info.grid,
        codebook_size=info.codebook_size,
        tokenizer=info.tokenizer,
        usage=usage.usage,
        perplexity=usage.perplexity,
        seconds=seconds,
        images_per_s=encoded / seconds,
    )


@torch.inference_mode()
def _encode(tokenizer: Tokenizer, data: str, shard: int, batch: int, usage: CodeUsage) -> CodeShard:
    codes, labels = [], []
    for images in shard_images(data, shard, resolution=tokenizer.model_config.resolution, batch=batch):
        found_Bhw = tokenizer.encode(to_float(images.images_u8.to(tokenizer.codebook_KD.device)))
        usage.update(found_Bhw)
        codes.append(found_Bhw.cpu())
        labels.append(images.labels)
    return CodeShard(torch.cat(codes), torch.cat(labels))
