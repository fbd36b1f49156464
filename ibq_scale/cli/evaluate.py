"""``ibq-scale evaluate``: measures of trained models and of their samples."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibq_scale.cli.options import JSON, RANKS, Family, argument, flag, show, whole

if TYPE_CHECKING:
    from ibq_scale.evaluate.conventions import ConventionResult
    from ibq_scale.evaluate.generation import GenerationReport
    from ibq_scale.evaluate.reconstruction import ReconstructionReport


CONVENTIONS = argument(
    "--conventions",
    metavar="NAMES",
    help="all, or names with commas from 'evaluate conventions' (default torch-fidelity)",
)
RESOLUTION = whole("--resolution", "centre crop of prepared data, in pixels", metavar="SIDE")
BATCH = whole("--batch", "images at once on a rank", 16)
LIMIT = whole("--limit", "only the first N images")
FAMILY = Family("evaluate", "measure models and samples", "what", "WHAT")
add_commands = FAMILY.add_commands


@FAMILY.command(
    "PSNR, SSIM, LPIPS, rFID and codebook usage of a tokenizer",
    "runs/tok s3://bucket/imagenet-val --json",
    argument("checkpoint", metavar="CKPT", help="run directory, checkpoint or exported model"),
    argument("data", metavar="DATA", help="folder or s3:// prefix from 'prepare images'"),
    flag(
        "--native",
        "one image at a time at its own size, cropped to a multiple of the downsampling (default: centre crop)",
    ),
    argument(
        "--pixels",
        choices=("8bit", "float"),
        default="8bit",
        help="reconstructions as files hold them (default), or before rounding, as LPIPS and rFID were published",
    ),
    argument(
        "--to", type=Path, metavar="DIR", help="write reconstruction.json, images.jsonl (a line an image) and worst.png"
    ),
    BATCH,
    LIMIT,
    CONVENTIONS,
    JSON,
    RANKS,
)
def _reconstruction(args: argparse.Namespace) -> int:
    """Reconstruct a data set. The figures do not depend on the number of ranks."""
    from ibq_scale.distributed.environment import join
    from ibq_scale.evaluate.reconstruction import evaluate_reconstruction

    with join() as world:
        how = {name: getattr(args, name) for name in ("batch", "limit", "native", "pixels", "to", "conventions")}
        report = evaluate_reconstruction(args.checkpoint, args.data, world, **how)
        return show(args, report, _reconstruction_lines(report)) if world.is_main else 0


def _reconstruction_lines(report: ReconstructionReport) -> Iterator[str]:
    size = "native size" if report.resolution is None else f"centre crop {report.resolution}"
    yield f"images       {report.images} of {report.data}, {size}, {report.pixels} pixels"
    yield f"PSNR         {report.psnr:.3f} dB"
    yield f"SSIM         {report.ssim:.4f}"
    for shown, name in {"LPIPS VGG": "lpips", "LPIPS Alex": "lpips_alex", "rFID": "rfid"}.items():
        yield _figure(report, shown, name)
    yield from _of_conventions(report.conventions)
    yield f"usage        {100 * report.usage:.2f} % of {report.codebook_size} codes"
    yield f"perplexity   {report.perplexity:.1f}"
    yield f"speed        {report.images_per_s:.1f} img/s"


@FAMILY.command(
    "gFID, inception score, precision and recall of samples",
    "samples --reference imagenet-256.npz --json",
    argument("samples", metavar="SAMPLES", help="folder of 'sample' or of pictures, .npz (arr_0), or prepared data"),
    argument(
        "--reference",
        required=True,
        metavar="WHAT",
        help="file of 'evaluate reference', the usual suite's .npz, or images as for SAMPLES",
    ),
    RESOLUTION,
    argument("--to", type=Path, metavar="DIR", help="write generation.json, for 'report' and 'compare'"),
    BATCH,
    LIMIT,
    CONVENTIONS,
    JSON,
    RANKS,
)
def _generation(args: argparse.Namespace) -> int:
    """Measure images against a reference. The figures do not depend on the number of ranks."""
    from ibq_scale.distributed.environment import join
    from ibq_scale.evaluate.generation import evaluate_generation

    with join() as world:
        how = {name: getattr(args, name) for name in ("batch", "limit", "to", "conventions")}
        size = args.resolution and (args.resolution, args.resolution)
        report = evaluate_generation(args.samples, args.reference, world, size=size, **how)
        return show(args, report, _generation_lines(report)) if world.is_main else 0


def _generation_lines(report: GenerationReport) -> Iterator[str]:
    stamp = report.reference_stamp
    real = "unstamped: its source is unknown" if stamp is None else stamp.words
    yield f"images       {report.images} of {report.samples}, {report.resolution[0]} x {report.resolution[1]}"
    yield f"reference    {report.reference} ({real})"
    yield f"gFID         {report.fid:.4f}"
    spread = "" if report.inception_score_std is None else f" ± {report.inception_score_std:.4f} over ten splits"
    yield _figure(report, "IS", "inception_score") + spread
    yield _figure(report, "precision", "precision")
    yield _figure(report, "recall", "recall")
    yield from _of_conventions(report.conventions)
    yield f"speed        {report.images_per_s:.1f} img/s"


@FAMILY.command(
    "statistics of real images, to measure samples against",
    "s3://bucket/imagenet --resolution 256 --to imagenet-256.npz",
    argument("data", metavar="DATA", help="prepared data (all of it), folder of pictures, or .npz (arr_0)"),
    argument("--to", required=True, type=Path, metavar="FILE.npz"),
    whole("--features", "images with features kept for precision and recall", 10_000),
    RESOLUTION,
    CONVENTIONS,
    BATCH,
    JSON,
    RANKS,
)
def _reference(args: argparse.Namespace) -> int:
    """Write moments and features of real images, stamped with their source."""
    from dataclasses import asdict

    from ibq_scale.distributed.environment import join
    from ibq_scale.evaluate.reference import write_reference

    with join() as world:
        how = {name: getattr(args, name) for name in ("batch", "features", "conventions")}
        size = args.resolution and (args.resolution, args.resolution)
        stamp = write_reference(args.data, args.to, size, world, **how)
        line = f"{args.to}: {stamp.words}, features of {stamp.features} (reference {stamp.hash[:12]})"
        return show(args, asdict(stamp) | {"hash": stamp.hash}, [line]) if world.is_main else 0


@FAMILY.command("the conventions of FID, and the one behind each published figure", "", JSON)
def _conventions(args: argparse.Namespace) -> int:
    """Print resize, quantisation and extractor of each convention, and the source of published figures."""
    from ibq_scale.evaluate.conventions import CONVENTIONS, PUBLISHED

    texts = ("suite", "resize", "quantisation", "extractor")
    rows = [{"name": c.name, **{text: getattr(c, text) for text in texts}} for c in CONVENTIONS.values()]
    lines = []
    for row in rows:
        lines += [row["name"], *(f"  {text:<12} {row[text]}" for text in texts)]
    lines.append("published figures: convention, reference, source")
    lines += [f"  {p.figure}: {p.convention or 'not told'}, against {p.reference} ({p.source})" for p in PUBLISHED]
    return show(args, {"conventions": rows, "published": PUBLISHED}, lines)


@FAMILY.command(
    "results of 'evaluate generation' side by side",
    "b.json l.json",
    argument("results", nargs="+", type=Path, metavar="FILE", help="generation.json, or the output of --json"),
    JSON,
)
def _compare(args: argparse.Namespace) -> int:
    """Results of different references are refused."""
    from ibq_scale.evaluate.generation import load_results

    results = load_results(args.results)
    return show(args, results, _compare_lines(args.results, results))


def _compare_lines(paths: Sequence[Path], results: Sequence[dict[str, Any]]) -> Iterator[str]:
    columns = {"fid": "gFID", "inception_score": "IS", "precision": "precision", "recall": "recall", "images": "images"}
    yield f"reference {results[0]['reference']} ({results[0]['reference_hash'][:12]})"
    yield " ".join(f"{shown:>10}" for shown in columns.values())
    for path, result in zip(paths, results, strict=True):
        values = (result.get(name) for name in columns)
        shown = ("-" if v is None else f"{v}" if isinstance(v, int) else f"{v:.4f}" for v in values)
        yield " ".join([*(f"{text:>10}" for text in shown), str(path)])


def _of_conventions(rows: Sequence[ConventionResult]) -> Iterator[str]:
    """A line each, if there is more than the report's own."""
    for row in rows if len(rows) > 1 else ():
        figures = {"FID": row.fid, "sFID": row.sfid, "IS": row.inception_score}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if value is not None)
        yield f"{row.convention:<15} {shown or row.not_measured['fid']}"


def _figure(report: ReconstructionReport | GenerationReport, shown: str, name: str) -> str:
    value = getattr(report, name)
    return f"{shown:<12} " + (f"not measured: {report.not_measured.get(name)}" if value is None else f"{value:.4f}")
