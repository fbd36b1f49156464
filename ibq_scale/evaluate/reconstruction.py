"""Quality of a tokenizer's reconstructions (PSNR, SSIM, LPIPS, rFID) and its use of the codebook."""

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
from ibq_scale.evaluate.conventions import Convention, ConventionResult, chosen
from ibq_scale.evaluate.fid import Inception
from ibq_scale.evaluate.pixels import psnr, ssim
from ibq_scale.evaluate.results import write_images, write_result
from ibq_scale.evaluate.scores import gather_rows
from ibq_scale.evaluate.suites import Sums, result_row
from ibq_scale.losses.perceptual import Net, Perceptual
from ibq_scale.losses.weights import OF_METRICS, SOURCES, missing
from ibq_scale.outputs import RECONSTRUCTION
from ibq_scale.pictures import to_uint8
from ibq_scale.pretrained.loading import load_tokenizer, model_directory
from ibq_scale.pretrained.models import Tokenizer
from ibq_scale.quantize.usage import CodeUsage

Pixels = Literal["8bit", "float"]
LPIPS: dict[str, Net] = {"lpips": "vgg", "lpips_alex": "alex"}
# Weight files by metric.
FILES = {metric: SOURCES[name].file for metric, name in OF_METRICS.items()}


@dataclass(frozen=True)
class ReconstructionReport:
    """Means over images, of reconstructions of centre crops.

    `model`: directory of the tokenizer. `resolution`: side of the crop, None for images at their own size. `pixels`:
    ``8bit`` for rounded reconstructions, as in a file, ``float`` for unrounded ones. `psnr`: dB. `ssim`: 0 to 1.
    `usage`: share (0 to 1) of codes chosen at least once over all images. `perplexity`: 1 to K. `lpips` (VGG),
    `lpips_alex` and `rfid` are None without their weights, and `not_measured` then names each missing file and its
    folder. `conventions`: a row for each requested convention, none without the weights. `rfid` is that of the first.
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
    conventions: list[ConventionResult]
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
    conventions: str | None = None,
) -> ReconstructionReport:
    """Reconstructs every image of a prepared data set (or the first `limit`). Collective.

    `native`: one by one at their own sizes, cropped to multiples of the downsampling. `to`: a folder for the report
    (``reconstruction.json``), a table of all images and a picture of the worst. `conventions`: names as for `chosen`.
    UserError if the checkpoint or the data is unusable.
    """
    begin = time.perf_counter()
    wanted = chosen(conventions)
    tokenizer = load_tokenizer(checkpoint, world.device)
    faults = {name: fault for name, file in FILES.items() if (fault := missing(file)) is not None}
    networks = Networks(world.device, [name for name in FILES if name not in faults], wanted)
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
    values, rows_NC, conventions_found = measure(tokenizer, networks, stream, world, pixels)
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
        conventions=conventions_found,
        **values,
    )
    if to is not None and world.is_main:
        write_images(to, data, tokenizer, networks.columns, rows_NC, resolution)
        write_result(to / RECONSTRUCTION, report)
    return report


class Networks:
    """The metric networks in `names`, from `FILES`, and the conventions of rFID. UserError if a file is absent."""

    def __init__(
        self, device: torch.device, names: Sequence[str], conventions: Sequence[Convention] = chosen(None)
    ) -> None:
        self.names = tuple(names)
        self.conventions = tuple(conventions)
        self.perceptual = {name: Perceptual(net, device) for name, net in LPIPS.items() if name in names}
        self.inception = Inception(device) if "rfid" in names else None

    @property
    def columns(self) -> tuple[str, ...]:
        """The metrics of single images."""
        return ("psnr", "ssim", *self.perceptual)


def measure(
    tokenizer: Tokenizer,
    networks: Networks,
    stream: Iterable[tuple[ImageBatch, Tensor]],
    world: World,
    pixels: Pixels = "8bit",
) -> tuple[dict[str, Any], Tensor, list[ConventionResult]]:
    """Figures of `ReconstructionReport` by name (None if not measured), a row per image, a row per convention.

    Collective.

    Rows (N, 3 + C) float64, on the CPU, in the set's order: position, shard, row, `Networks.columns`. The figures do
    not depend on the number of ranks: per-image values are gathered and summed exactly (math.fsum), and the sums for
    rFID and the histogram of codes are integers.
    """
    measures = _Measures(tokenizer, networks, world, pixels)
    for images, weights_B in stream:
        measures.add(images.images_u8.to(world.device), images.requests, weights_B)
    rows_NC = measures.gather()
    rows = measures.conventions(len(rows_NC))
    return measures.finish(rows_NC) | {"rfid": rows[0].fid if rows else None}, rows_NC, rows


class _Measures:
    """Accumulates all metrics, image by image."""

    def __init__(self, tokenizer: Tokenizer, networks: Networks, world: World, pixels: Pixels) -> None:
        self.tokenizer = tokenizer
        self.networks = networks
        self.world = world
        self.pixels = pixels
        self.rows: list[Tensor] = []
        self.usage = CodeUsage(tokenizer.quantizer_config.codebook_size, world.device)
        self.sums: tuple[Sums, ...] = ()
        if networks.inception is not None:
            self.sums = tuple(Sums(networks.conventions, networks.inception, world.device) for _ in range(2))

    @torch.inference_mode()
    def add(self, images_u8: Tensor, requests_B5: Tensor, weights_B: Tensor) -> None:
        """Adds one batch. Images of weight 0 are padding."""
        images = to_float(images_u8)
        codes_Bhw = self.tokenizer.encode(images)
        real_B = weights_B.to(codes_Bhw.device) > 0
        self.usage.update(codes_Bhw[real_B])
        decoded, decoded_255 = self._decode(codes_Bhw)
        values = [psnr(images_u8, decoded_255), ssim(images_u8, decoded_255)]
        values += [perceptual(images, decoded).double() for perceptual in self.networks.perceptual.values()]
        places = requests_B5[:, [0, 3, 4]].to(images.device).double()
        self.rows.append(torch.cat([places, torch.stack(values, dim=1)], dim=1)[real_B])
        for sums, pictures in zip(self.sums, (decoded_255, images_u8), strict=bool(self.sums)):
            sums.update(pictures, weights_B)

    def _decode(self, codes_Bhw: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions as float in -1 … 1 and as pixels 0 … 255."""
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
        return values

    def conventions(self, images: int) -> list[ConventionResult]:
        """Distances of reconstructions and images by each convention. None for fewer than two images. Collective."""
        if not self.sums or images < 2 or self.networks.inception is None:
            return []
        fake, real = (sums.moments() for sums in self.sums)
        origin = {
            "extractor_sha256": self.networks.inception.sha256,
            "reference": "the same images with the same crop",
            "reference_images": images,
            "images": images,
        }
        words = "8-bit" if self.pixels == "8bit" else "unrounded"
        return [result_row(convention, real, fake, words, origin) for convention in self.networks.conventions]
