"""The demo's ``report.json`` and ``report.html``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ibq_scale.console import duration
from ibq_scale.data.manifest import load_manifest
from ibq_scale.data.stream import evaluation_images, to_float
from ibq_scale.demo.photographs import PHOTOGRAPHS
from ibq_scale.demo.plan import HELD_OUT, IMAGES, Demo
from ibq_scale.outputs import SAMPLES
from ibq_scale.pictures import image_grid, to_png, to_uint8
from ibq_scale.pretrained.loading import load_tokenizer
from ibq_scale.report.page import Bars, Gallery, Picture, Section, Table, Tiles, write
from ibq_scale.report.runs import RunLog, curves, environments, load_run

TOKENIZER_CURVES = ("loss", "l1", "quantization", "entropy", "lr", "samples_per_s")
AR_CURVES = ("loss", "grad_norm", "lr", "samples_per_s")
# Side of the thumbnails for the nearest photograph of a sample.
THUMBNAIL = 8


def write_demo_report(demo: Demo) -> dict[str, Any]:
    """Writes both files. Returns the content of ``report.json``."""
    ibq, vq, ar = (load_run(demo.run_dir(key), name) for key, name in (("ibq", "IBQ"), ("vq", "VQ"), ("ar", "AR")))
    resolution = int(ibq.config["model"]["resolution"])
    photographs, held_out = _Photographs(IMAGES, resolution), _Photographs(HELD_OUT, resolution)
    samples = _samples(demo.to / "samples" / SAMPLES)
    facts = _facts(demo, ar) | {"samples_recognised": photographs.recognised(*samples)}
    (demo.to / "report.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    sections = [
        _summary(facts),
        _collapse(demo, ibq, vq),
        _reconstructions(demo, held_out),
        Section("Samples by class", _SAMPLES_TEXT, [_sample_gallery(photographs, *samples)]),
        Section("The tokenizers' training", "", curves([ibq, vq], TOKENIZER_CURVES)),
        Section("The transformer's training", "", curves([ar], AR_CURVES)),
        Section("Time", "Each stage is one command. The commands work in a shell too.", [_bars(demo), _commands(demo)]),
        Section("Environment", "", [environments([ar])]),
    ]
    subtitle = f"Photographs → shards in S3 → tokenizer → codes → transformer → samples, on {demo.plan.ranks} ranks"
    write(demo.to / "report.html", "ibq-scale: the whole path", subtitle, sections)
    return facts


_SAMPLES_TEXT = (
    "The first picture of each strip is a real crop of the class. The others are samples: the transformer draws the "
    "codes of the class one by one, with classifier-free guidance, and the IBQ tokenizer decodes them. A sample counts "
    "as recognised where its nearest training crop is of its own class. This short training shows that the class label "
    "steers the picture. It does not show the quality that the method reaches."
)


def _facts(demo: Demo, ar: RunLog) -> dict[str, Any]:
    ibq, vq = demo.results["evaluate IBQ"], demo.results["evaluate VQ"]
    losses = [point.value for point in ar.points("loss")]
    speeds = [point.value for point in ar.points("samples_per_s")]
    tokens = int(ar.config["model"]["tokens"])
    return {
        "usage_ibq": ibq["usage"],
        "usage_vq": vq["usage"],
        "perplexity_ibq": ibq["perplexity"],
        "perplexity_vq": vq["perplexity"],
        "codebook_size": ibq["codebook_size"],
        "psnr": ibq["psnr"],
        "psnr_vq": vq["psnr"],
        "ssim": ibq["ssim"],
        "ssim_vq": vq["ssim"],
        "ar_loss_start": losses[0],
        "ar_loss_end": losses[-1],
        "ar_train_tokens_per_s": float(np.median(speeds)) * tokens,
        "sample_tokens_per_s": demo.results["sample"]["tokens_per_s"],
        "tokenize_images_per_s": demo.results["tokenize"]["images_per_s"],
        "images": demo.results["prepare"]["samples"],
        "held_out_images": demo.results["prepare the held-out crops"]["samples"],
        "world_size": int(ar.environment["world_size"]),
        "tokenizer_steps": demo.plan.tokenizer_steps,
        "ar_steps": demo.plan.ar_steps,
        "seconds": {stage.name: round(stage.seconds, 2) for stage in demo.stages},
        "seconds_total": round(demo.seconds, 2),
    }


def _summary(facts: dict[str, Any]) -> Section:
    size, held_out = facts["codebook_size"], facts["held_out_images"]
    text = (
        f"This page shows a whole run of ibq-scale. {facts['images']} crops of {len(PHOTOGRAPHS)} photographs train "
        "two image tokenizers that differ in the quantizer and its settings. A transformer then learns the codes of "
        f"the first one and draws new pictures. IBQ uses {_percent(facts['usage_ibq'])} of its {size:,} codes, VQ "
        f"{_percent(facts['usage_vq'])}, counted on {held_out} crops that no training has seen. "
        f"{_psnr_in_words(facts)}"
    )
    items = [
        ("Codebook usage, IBQ", _percent(facts["usage_ibq"]), f"of {size:,} codes, held-out crops"),
        ("Codebook usage, VQ", _percent(facts["usage_vq"]), "same data, same steps"),
        ("PSNR, IBQ", f"{facts['psnr']:.2f} dB", f"held-out crops; VQ: {facts['psnr_vq']:.2f} dB"),
        ("SSIM, IBQ", f"{facts['ssim']:.3f}", f"held-out crops; VQ: {facts['ssim_vq']:.3f}"),
        ("AR loss", f"{facts['ar_loss_start']:.2f} → {facts['ar_loss_end']:.2f}", "nats a code"),
        ("AR training", f"{facts['ar_train_tokens_per_s']:,.0f}", "tokens/s, all ranks"),
        ("Sampling", f"{facts['sample_tokens_per_s']:,.0f}", "tokens/s, all ranks"),
        ("Samples recognised", _percent(facts["samples_recognised"]), f"chance: {_percent(1 / len(PHOTOGRAPHS))}"),
        ("Whole path", duration(facts["seconds_total"]), f"{facts['world_size']} ranks"),
    ]
    return Section("At a glance", text, [Tiles(items)])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def _psnr_in_words(facts: dict[str, Any]) -> str:
    """The two PSNR, and the limits of so short a training."""
    ahead = "IBQ" if facts["psnr"] >= facts["psnr_vq"] else "VQ"
    return (
        f"PSNR is {facts['psnr']:.1f} dB with IBQ and {facts['psnr_vq']:.1f} dB with VQ: after "
        f"{facts['tokenizer_steps']} steps each {ahead} is ahead. So few steps on ten photographs do not rank the "
        "quantizers. A full training does: published rFID on ImageNet at 1,024 codes is 2.24 with IBQ and 7.94 with VQ "
        "(lower is better)."
    )


def _collapse(demo: Demo, ibq: RunLog, vq: RunLog) -> Section:
    text = (
        f"Both runs have the same encoder, decoder and data, and {demo.plan.tokenizer_steps} steps of equal time. Each "
        "has the best loss weights and rates of those tried for it (docs/experiments.md). VQ moves only the codes that "
        "win, so most of them never do. Index backpropagation gives every code a gradient, "
        "and an entropy term spreads the choices. The third chart shows PSNR on the held-out crops over the training."
    )
    return Section("The codebook: IBQ beside VQ", text, curves([ibq, vq], ("usage", "perplexity", "validation_psnr")))


def _reconstructions(demo: Demo, photographs: _Photographs) -> Section:
    originals = photographs.one_a_class()
    rows = [originals, *(_reconstructed(demo.run_dir(name), originals) for name in ("ibq", "vq"))]
    picture = image_grid(torch.cat(rows), columns=len(originals))
    text = "Held-out crops, encoded to codes and decoded again. No training has seen these crops."
    caption = "First row: originals. Second row: IBQ. Third row: VQ, the same number of steps."
    return Section("Originals and reconstructions", text, [Picture(to_png(picture), caption, caption)])


@torch.inference_mode()
def _reconstructed(run: Path, originals_u8: Tensor) -> Tensor:
    return to_uint8(load_tokenizer(run).reconstruct(to_float(originals_u8)))


def _samples(path: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, H, W) and labels (N,)."""
    with np.load(path) as content:
        return torch.from_numpy(content["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(content["arr_1"])


def _sample_gallery(photographs: _Photographs, images_u8: Tensor, labels: Tensor) -> Gallery:
    real = photographs.one_a_class()
    rows = []
    for label, name in enumerate(photographs.classes):
        strip = torch.cat([real[label][None], images_u8[labels == label]])
        rows.append((name, to_png(image_grid(strip, columns=len(strip)))))
    return Gallery(rows, "One class a strip; the first picture of each is real.")


class _Photographs:
    """One data set's images from the bucket, centre-cropped: uint8 (N, 3, H, W) and labels (N,)."""

    def __init__(self, url: str, resolution: int) -> None:
        self.classes = load_manifest(url, "images").classes
        stream = evaluation_images(url, resolution=resolution, rank=0, world_size=1, batch=50)
        parts = [(batch.images_u8[weights > 0], batch.labels[weights > 0]) for batch, weights in stream]
        self.images_u8 = torch.cat([images for images, _ in parts])
        self.labels = torch.cat([labels for _, labels in parts])

    def one_a_class(self) -> Tensor:
        """uint8 (classes, 3, H, W)."""
        first = [int((self.labels == label).nonzero()[0]) for label in range(len(self.classes))]
        return self.images_u8[first]

    def recognised(self, images_u8: Tensor, labels: Tensor) -> float:
        """Share (0 to 1) of images with a nearest photograph, by tiny thumbnails, of their own class."""
        distances = torch.cdist(_thumbnails(images_u8), _thumbnails(self.images_u8))
        return float((self.labels[distances.argmin(dim=1)] == labels).double().mean())


def _thumbnails(images_u8: Tensor) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images_u8.float(), THUMBNAIL).flatten(1)


def _bars(demo: Demo) -> Bars:
    return Bars("Seconds a stage", [(stage.name, stage.seconds) for stage in demo.stages])


def _commands(demo: Demo) -> Table:
    return Table(["stage", "command"], [(stage.name, stage.command) for stage in demo.stages])
