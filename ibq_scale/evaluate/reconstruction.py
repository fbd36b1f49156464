"""How well a tokenizer gives images back: PSNR, SSIM, LPIPS, rFID; and how much of its codebook it uses."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ibq_scale.data.stream import evaluation_images, to_float
from ibq_scale.distributed.environment import World
from ibq_scale.evaluate.fid import INCEPTION, FeatureStatistics, Inception, frechet_distance
from ibq_scale.evaluate.pixels import psnr, ssim
from ibq_scale.losses.perceptual import BACKBONES, Perceptual
from ibq_scale.pictures import to_uint8
from ibq_scale.pretrained.loading import Tokenizer, load_tokenizer
from ibq_scale.quantize.usage import CodeUsage
from ibq_scale.weights import missing


@dataclass(frozen=True)
class ReconstructionReport:
    """Means over images, of 8-bit reconstructions of centre crops.

    `psnr` in dB; `ssim` 0 to 1; `usage` the share (0 to 1) of codes chosen at least once over all images;
    `perplexity` 1 to K; `lpips` (VGG) and `rfid` are None where their weights are absent, and `not_measured` then
    says for each which file to put where.
    """

    data: str
    images: int
    resolution: int
    tokenizer: str
    codebook_size: int
    psnr: float
    ssim: float
    usage: float
    perplexity: float
    lpips: float | None
    rfid: float | None
    not_measured: dict[str, str]
    seconds: float
    images_per_s: float


def evaluate_reconstruction(
    checkpoint: str | Path, data: str, world: World, *, batch: int, limit: int | None = None
) -> ReconstructionReport:
    """Reconstructs every image of a prepared data set (or the first `limit`). Collective.

    The figures do not depend on the number of ranks: per-image values are gathered and summed exactly (math.fsum),
    the histogram of codes is of integers. UserError where the checkpoint or the data cannot be used.
    """
    begin = time.perf_counter()
    tokenizer = load_tokenizer(checkpoint, world.device)
    measures = _Measures(tokenizer, world)
    resolution = tokenizer.model_config.resolution
    stream = evaluation_images(
        data, resolution=resolution, rank=world.rank, world_size=world.size, batch=batch, limit=limit
    )
    for images, weights_B in stream:
        measures.add(images.images_u8.to(world.device), weights_B)
    values, images_seen = measures.finish()
    seconds = time.perf_counter() - begin
    return ReconstructionReport(
        data=data,
        images=images_seen,
        resolution=resolution,
        tokenizer=tokenizer.hash,
        codebook_size=tokenizer.quantizer_config.codebook_size,
        seconds=seconds,
        images_per_s=images_seen / seconds,
        **values,
    )


class _Measures:
    """Everything that is gathered image by image."""

    def __init__(self, tokenizer: Tokenizer, world: World) -> None:
        self.tokenizer = tokenizer
        self.world = world
        self.rows: list[Tensor] = []
        self.usage = CodeUsage(tokenizer.quantizer_config.codebook_size, world.device)
        faults = {"lpips": missing(BACKBONES["vgg"]), "rfid": missing(INCEPTION)}
        self.not_measured = {name: fault for name, fault in faults.items() if fault is not None}
        self.perceptual = None if "lpips" in self.not_measured else Perceptual("vgg", world.device)
        self.inception = None if "rfid" in self.not_measured else Inception(world.device)
        self.real, self.fake = FeatureStatistics(device=world.device), FeatureStatistics(device=world.device)

    @torch.inference_mode()
    def add(self, images_u8: Tensor, weights_B: Tensor) -> None:
        """One batch; images of weight 0 are padding."""
        images = to_float(images_u8)
        codes_Bhw = self.tokenizer.encode(images)
        decoded_u8 = to_uint8(self.tokenizer.decode(codes_Bhw))
        self.usage.update(codes_Bhw[weights_B.to(codes_Bhw.device) > 0])
        columns = [weights_B.double().to(images.device), psnr(images_u8, decoded_u8), ssim(images_u8, decoded_u8)]
        if self.perceptual is not None:
            columns.append(self.perceptual(images, to_float(decoded_u8)).double())
        self.rows.append(torch.stack(columns, dim=1))
        if self.inception is not None:
            self.real.update(self.inception(images_u8), weights_B)
            self.fake.update(self.inception(decoded_u8), weights_B)

    def finish(self) -> tuple[dict[str, Any], int]:
        """Global values and the number of images. Collective."""
        table = torch.cat(self.rows)
        gathered = [torch.empty_like(table) for _ in range(self.world.size)]
        dist.all_gather(gathered, table)
        rows = torch.cat(gathered)
        rows = rows[rows[:, 0] > 0].cpu()
        means = [math.fsum(column.tolist()) / len(rows) for column in rows[:, 1:].unbind(dim=1)]
        self.usage.reduce()
        values = {
            "psnr": means[0],
            "ssim": means[1],
            "lpips": means[2] if self.perceptual is not None else None,
            "rfid": self._rfid(),
            "usage": self.usage.usage,
            "perplexity": self.usage.perplexity,
            "not_measured": self.not_measured,
        }
        return values, len(rows)

    def _rfid(self) -> float | None:
        if self.inception is None:
            return None
        self.real.reduce()
        self.fake.reduce()
        return frechet_distance(self.real, self.fake)
