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
    rFID and the histogram of codes are integers. There are no conventions for fewer than two images.
    """
    usage = CodeUsage(tokenizer.quantizer_config.codebook_size, world.device)
    inception = networks.inception
    sums = () if inception is None else [Sums(networks.conventions, inception, world.device) for _ in range(2)]
    found: list[Tensor] = []
    for images, weights_B in stream:
        images_u8 = images.images_u8.to(world.device)
        # Images of weight 0 are padding.
        held_B = (weights_B > 0).to(world.device)
        with torch.inference_mode():
            originals = to_float(images_u8)
            codes_Bhw = tokenizer.encode(originals)
            usage.update(codes_Bhw[held_B])
            decoded, decoded_255 = _pixels(tokenizer.decode(codes_Bhw), pixels)
            values = [psnr(images_u8, decoded_255), ssim(images_u8, decoded_255)]
            values += [net(originals, decoded).double() for net in networks.perceptual.values()]
            places = images.requests[:, [0, 3, 4]].to(world.device).double()
            found.append(torch.cat([places, torch.stack(values, dim=1)], dim=1)[held_B])
            for part, pictures in zip(sums, (decoded_255, images_u8), strict=False):
                part.update(pictures, weights_B)
    rows_nC = torch.cat(found)
    rows_NC = gather_rows(rows_nC[:, 0].long(), rows_nC).cpu()
    usage.reduce()
    figures: dict[str, Any] = dict.fromkeys(FILES) | {"usage": usage.usage, "perplexity": usage.perplexity}
    for name, column in zip(networks.columns, rows_NC[:, 3:].unbind(dim=1), strict=True):
        figures[name] = math.fsum(column.tolist()) / len(rows_NC)
    conventions = []
    if inception is not None and len(rows_NC) > 1:
        origin: dict[str, Any] = {
            "extractor_sha256": inception.sha256,
            "reference": "the same images with the same crop",
            "reference_images": len(rows_NC),
            "images": len(rows_NC),
        }
        words = "8-bit" if pixels == "8bit" else "unrounded"
        fake, real = (part.moments() for part in sums)
        conventions = [result_row(each, real, fake, words, {}, **origin) for each in networks.conventions]
        figures["rfid"] = conventions[0].fid
    return figures, rows_NC, conventions


def _pixels(decoded: Tensor, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Reconstructions as float in -1 … 1 and as pixels 0 … 255."""
    if pixels == "float":
        decoded = decoded.clamp(-1.0, 1.0)
        return decoded, (decoded + 1.0) * 127.5
    decoded_u8 = to_uint8(decoded)
    return to_float(decoded_u8), decoded_u8
