"""Images → code shards, one per image shard, shared out over ranks. A restart keeps finished shards."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ibq_scale.data.codes import CodeShard, code_shard_name, find_code_shard, finish_codes, write_code_shard
from ibq_scale.data.folder import Store
from ibq_scale.data.images import shard_index
from ibq_scale.data.manifest import CodesInfo, ConditionInfo, Manifest, ShardInfo, load_manifest
from ibq_scale.data.sets import DataSet
from ibq_scale.data.store import open_store
from ibq_scale.data.stream import shard_images, to_float
from ibq_scale.distributed.agree import by_rank_0, of_all_ranks
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.pretrained.loading import load_tokenizer
from ibq_scale.pretrained.models import Tokenizer
from ibq_scale.pretrained.text import Captions, text_encoder
from ibq_scale.quantize.usage import CodeUsage

# LlamaGen's ten crops come from a centre square of this multiple of the resolution.
TEN_CROP_RANGE = 1.1
Crops = Literal["center", "ten"]
Part = tuple[int, int]
"""Task i of n of an array of jobs: shards i, i + n, …"""


@dataclass(frozen=True)
class TokenizeReport:
    """The result of `tokenize`. `usage` (0 to 1) and `perplexity` cover the images of newly written shards.

    `complete`: every shard and the manifest exist. Otherwise other parts of the array are missing.
    """

    url: str
    complete: bool
    images: int
    crops: int
    shards: int
    reused_shards: int
    grid: tuple[int, int]
    codebook_size: int
    tokenizer: str
    usage: float
    perplexity: float
    seconds: float
    images_per_s: float


def tokenize(
    checkpoint: str | Path,
    data: str,
    to: str,
    world: World,
    *,
    batch: int,
    crops: Crops = "center",
    part: Part = (0, 1),
    captions: str | None = None,
    encoder: str = "hash",
    caption_tokens: int | None = None,
) -> TokenizeReport:
    """Encodes every image at the tokenizer's resolution and writes shards, then the manifest. Collective.

    `captions`: a file as for `Captions`. The text encoder `encoder` turns them into at most `caption_tokens` vectors
    an image, stored with the codes.

    Rank r takes every W-th of the part's shards. Shards from an earlier run with the same tokenizer and images are
    kept. The part that finds all shards writes the manifest. UserError if the checkpoint or the data is unusable.
    """
    begin = time.perf_counter()
    manifest = load_manifest(data, "images")
    tokenizer = load_tokenizer(checkpoint, world.device)
    images = DataSet(manifest, open_store(data))
    texts = None if captions is None else Captioner(images, captions, encoder, caption_tokens, world.device)
    info = _info(tokenizer, manifest, crops, texts)
    store = open_store(to)
    if store.url == images.store.url:
        raise UserError(f"--to {to} is the folder of the images: give the codes another one")
    usage = CodeUsage(info.codebook_size, world.device)
    mine: dict[int, ShardInfo] = {}
    encoded = reused = 0
    for number in range(len(manifest.shards))[part[0] :: part[1]][world.rank :: world.size]:
        image_shard = manifest.shards[number]
        name = code_shard_name(image_shard.name)
        found = find_code_shard(store, name, info, image_shard.samples)
        reused += found is not None
        if found is None:
            encoded += image_shard.samples
            codes = _encode(tokenizer, data, number, batch, crops, usage)
            vectors = () if texts is None else texts.shard(number)
            found = write_code_shard(store, name, CodeShard(*codes, *vectors), info)
        mine[number] = found
    gathered = of_all_ranks(world, (mine, encoded, reused))
    done = dict(sorted((k, v) for shards, _, _ in gathered for k, v in shards.items()))
    complete = by_rank_0(world, lambda: _finish(store, manifest, done, info))
    usage.reduce()
    seconds = time.perf_counter() - begin
    encoded = sum(count for _, count, _ in gathered)
    return TokenizeReport(
        url=store.url,
        complete=complete,
        images=sum(manifest.shards[number].samples for number in done),
        crops=info.crops,
        shards=len(done),
        reused_shards=sum(count for *_, count in gathered),
        grid=info.grid,
        codebook_size=info.codebook_size,
        tokenizer=info.tokenizer,
        usage=usage.usage,
        perplexity=usage.perplexity,
        seconds=seconds,
        images_per_s=encoded / seconds,
    )


def _info(tokenizer: Tokenizer, manifest: Manifest, crops: Crops, texts: Captioner | None) -> CodesInfo:
    side = tokenizer.model_config.resolution // tokenizer.downsampling
    return CodesInfo(
        codebook_size=tokenizer.quantizer_config.codebook_size,
        grid=(side, side),
        crops=10 if crops == "ten" else 1,
        tokenizer=tokenizer.hash,
        source=manifest.hash,
        condition=None if texts is None else texts.info,
    )


def _finish(store: Store, manifest: Manifest, done: dict[int, ShardInfo], info: CodesInfo) -> bool:
    """Writes the manifest if all shards of the other parts exist too."""
    shards = []
    for number, image_shard in enumerate(manifest.shards):
        name = code_shard_name(image_shard.name)
        found = done.get(number) or find_code_shard(store, name, info, image_shard.samples)
        if found is None:
            return False
        shards.append(found)
    finish_codes(store, shards, manifest.classes, info)
    return True


class Captioner:
    """Vectors of the captions of a data set's images. UserError for unusable captions or encoders."""

    def __init__(self, images: DataSet, captions: str, encoder: str, tokens: int | None, device: torch.device) -> None:
        self.images = images
        self.captions = Captions(captions)
        self.encoder = text_encoder(encoder, tokens, device)
        sizes = {"tokens": self.encoder.tokens, "width": self.encoder.width}
        self.info = ConditionInfo(encoder=encoder, captions=self.captions.hash, **sizes)

    def shard(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Vectors and spans of one `CodeShard`. Images with the same caption share vectors. UserError for an image
        without a caption.
        """
        classes = self.images.manifest.classes
        members = shard_index(self.images, number).members
        texts = [self.captions.of(m.key, m.source, classes[m.label]) for m in members]
        different = list(dict.fromkeys(texts))
        rows = self.encoder.encode(different)
        lengths = [len(row) for row in rows]
        spans = dict(zip(different, zip(accumulate(lengths, initial=0), lengths, strict=False), strict=True))
        return torch.cat(rows).numpy(), np.array([spans[text] for text in texts])


@torch.inference_mode()
def _encode(
    tokenizer: Tokenizer, data: str, shard: int, batch: int, crops: Crops, usage: CodeUsage
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Codes and labels of one `CodeShard`."""
    resolution = tokenizer.model_config.resolution
    square = round(TEN_CROP_RANGE * resolution) if crops == "ten" else resolution
    codes, labels = [], []
    for images in shard_images(data, shard, resolution=square, batch=batch):
        parts = ten_crops(images.images_u8, resolution) if crops == "ten" else [images.images_u8]
        found = [tokenizer.encode(to_float(part.to(tokenizer.codebook_KD.device))) for part in parts]
        codes_BChw = torch.stack(found, dim=1)
        usage.update(codes_BChw)
        codes.append(codes_BChw.cpu())
        labels.append(images.labels)
    return torch.cat(codes).numpy(), torch.cat(labels).numpy()


def ten_crops(images_BCHW: Tensor, side: int) -> list[Tensor]:
    """The four corners and the centre, then their mirror images: 10 × (B, C, side, side)."""
    height, width = images_BCHW.shape[2:]
    far_y, far_x = height - side, width - side
    corners = [(0, 0), (0, far_x), (far_y, 0), (far_y, far_x), (far_y // 2, far_x // 2)]
    five = [images_BCHW[:, :, y : y + side, x : x + side] for y, x in corners]
    return five + [crop.flip(3) for crop in five]
