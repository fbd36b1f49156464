"""How well a tokenizer gives images back: PSNR, SSIM, LPIPS, rFID; and how much of its codebook it uses."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ibq_scale.data.stream import ImageBatch, evaluation_images, to_float
from ibq_scale.distributed.world import World
from ibq_scale.evaluate.fid import FeatureStatistics, Inception, frechet_distance
from ibq_scale.evaluate.gather import gather_rows
from ibq_scale.evaluate.names import RECONSTRUCTION
from ibq_scale.evaluate.pixels import psnr, ssim
from ibq_scale.evaluate.results import write_result
from ibq_scale.evaluate.worst import write_images
from ibq_scale.losses.perceptual import Net, Perceptual
from ibq_scale.losses.weights import OF_METRICS, SOURCES, missing
from ibq_scale.pictures import to_uint8
from ibq_scale.pretrained.loading import Tokenizer, load_tokenizer, model_directory
from ibq_scale.quantize.usage import CodeUsage

Pixels = Literal["8bit", "float"]
LPIPS: dict[str, Net] = {"lpips": "vgg", "lpips_alex": "alex"}
# Files that measures need, by measure.
FILES = {metric: SOURCES[name].file for metric, name in OF_METRICS.items()}


@dataclass(frozen=True)
class ReconstructionReport:
    """Means over images, of reconstructions of centre crops.

    `model`: the directory that the tokenizer was read from.
    `resolution` is the crop's side, None where images kept their size; `pixels` ``8bit`` measures reconstructions
    rounded as files hold them, ``float`` before rounding. `psnr` in dB; `ssim` 0 to 1; `usage` the share (0 to 1) of
    codes chosen at least once over all images; `perplexity` 1 to K; `lpips` (VGG), `lpips_alex` and `rfid` are None
    where their weights are absent, and `not_measured` then says for each which file to put where.
    """

    data: str
    images: int
    resolution: int | None
    pixels: Pixels
    model: str
    tokenizer: str
    codebook_size: int
    psnr: float
    ssim: float
    usage: float
    perplexity: float
    lpips: float | None
    lpips_alex: float | None
    rfid: float | None
    not_measured: dict[str, str]
    seconds: float
    images_per_s: float


def evaluate_reconstruction(
    checkpoint: str | Path,
    data: str,
    world: World,
    *,
    batch: int,
    limit: int | None = None,
    native: bool = False,
    pixels: Pixels = "8bit",
    to: Path | None = None,
) -> ReconstructionReport:
    """Reconstructs every image of a prepared data set (or the first `limit`). Collective.

    `native`: one by one at their own sizes, cropped to what the downsampling divides. `to`: a folder for the report
    (``reconstruction.json``), a table of all images and a picture of the worst. UserError where the checkpoint or the
    data cannot be used.
    """
    begin = time.perf_counter()
    tokenizer = load_tokenizer(checkpoint, world.device)
    faults = {name: fault for name, file in FILES.items() if (fault := missing(file)) is not None}
    networks = Networks(world.device, [name for name in FILES if name not in faults])
    resolution = None if native else tokenizer.model_config.resolution
    stream = evaluation_images(
        data,
        resolution=resolution,
        rank=world.rank,
        world_size=world.size,
        batch=1 if native else batch,
        limit=limit,
        multiple=tokenizer.downsampling,
    )
    values, rows_NC = measure(tokenizer, networks, stream, world, pixels)
    if "rfid" in networks.names and values["rfid"] is None:
        faults["rfid"] = "it needs two images at least"
    seconds = time.perf_counter() - begin
    report = ReconstructionReport(
        data=data,
        images=len(rows_NC),
        resolution=resolution,
        pixels=pixels,
        model=str(model_directory(Path(checkpoint)).resolve()),
        tokenizer=tokenizer.hash,
        codebook_size=tokenizer.quantizer_config.codebook_size,
        seconds=seconds,
        images_per_s=len(rows_NC) / seconds,
        not_measured=faults,
        **values,
    )
    if to is not None and world.is_main:
        write_images(to, data, tokenizer, networks.columns, rows_NC, resolution)
        write_result(to / RECONSTRUCTION, report)
    return report


class Networks:
    """What reconstructions are looked at through: of `FILES`, those in `names`. UserError where a file is absent."""

    def __init__(self, device: torch.device, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.perceptual = {name: Perceptual(net, device) for name, net in LPIPS.items() if name in names}
        self.inception = Inception(device) if "rfid" in names else None

    @property
    def columns(self) -> tuple[str, ...]:
        """What is measured image by image."""
        return ("psnr", "ssim", *self.perceptual)


def measure(
    tokenizer: Tokenizer,
    networks: Networks,
    stream: Iterable[tuple[ImageBatch, Tensor]],
    world: World,
    pixels: Pixels = "8bit",
) -> tuple[dict[str, Any], Tensor]:
    """Figures of `ReconstructionReport` by name, None where not measured, and a row an image. Collective.

    Rows (N, 3 + C) float64, on the CPU, in the set's order: position, shard, row, `Networks.columns`. The figures do
    not depend on the number of ranks: per-image values are gathered and summed exactly (math.fsum), the sums behind
    rFID and the histogram of codes are of integers.
    """
    measures = _Measures(tokenizer, networks, world, pixels)
    for images, weights_B in stream:
        measures.add(images.images_u8.to(world.device), images.requests, weights_B)
    rows_NC = measures.gather()
    return measures.finish(rows_NC), rows_NC


class _Measures:
    """Everything that is gathered image by image."""

    def __init__(self, tokenizer: Tokenizer, networks: Networks, world: World, pixels: Pixels) -> None:
        self.tokenizer = tokenizer
        self.networks = networks
        self.world = world
        self.pixels = pixels
        self.rows: list[Tensor] = []
        self.usage = CodeUsage(tokenizer.quantizer_config.codebook_size, world.device)
        width = 0 if networks.inception is None else networks.inception.width
        self.real, self.fake = (FeatureStatistics(width, world.device) for _ in range(2))

    @torch.inference_mode()
    def add(self, images_u8: Tensor, requests_B5: Tensor, weights_B: Tensor) -> None:
        """One batch; images of weight 0 are padding."""
        images = to_float(images_u8)
        codes_Bhw = self.tokenizer.encode(images)
        held = weights_B.to(codes_Bhw.device) > 0
        self.usage.update(codes_Bhw[held])
        decoded, decoded_255 = self._decode(codes_Bhw)
        values = [psnr(images_u8, decoded_255), ssim(images_u8, decoded_255)]
        values += [perceptual(images, decoded).double() for perceptual in self.networks.perceptual.values()]
        places = requests_B5[:, [0, 3, 4]].to(images.device).double()
        self.rows.append(torch.cat([places, torch.stack(values, dim=1)], dim=1)[held])
        if self.networks.inception is not None:
            self.real.update(self.networks.inception(images_u8), weights_B)
            self.fake.update(self.networks.inception(decoded_255), weights_B)

    def _decode(self, codes_Bhw: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions, as float of -1 … 1 and in pixels of 0 … 255."""
        decoded = self.tokenizer.decode(codes_Bhw)
        if self.pixels == "float":
            decoded = decoded.clamp(-1.0, 1.0)
            return decoded, (decoded + 1.0) * 127.5
        decoded_u8 = to_uint8(decoded)
        return to_float(decoded_u8), decoded_u8

    def gather(self) -> Tensor:
        """Rows (N, 3 + C) float64 of all images in order, on the CPU: position, shard, row, values. Collective."""
        rows_nC = torch.cat(self.rows)
        return gather_rows(rows_nC[:, 0].long(), rows_nC).cpu()

    def finish(self, rows_NC: Tensor) -> dict[str, Any]:
        """Global values. Collective."""
        columns = zip(self.networks.columns, rows_NC[:, 3:].unbind(dim=1), strict=True)
        values: dict[str, Any] = dict.fromkeys(FILES)
        values |= {name: math.fsum(column.tolist()) / len(rows_NC) for name, column in columns}
        self.usage.reduce()
        values |= {"usage": self.usage.usage, "perplexity": self.usage.perplexity}
        if self.networks.inception is not None and len(rows_NC) > 1:
            self.real.reduce()
            self.fake.reduce()
            values["rfid"] = frechet_distance(self.real, self.fake)
        return values
