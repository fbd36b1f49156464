"""``ibq-scale evaluate``: measures of trained models and of their samples."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibq_scale.cli.options import add_ranks, at_least_one

if TYPE_CHECKING:
    from ibq_scale.evaluate.conventions import ConventionResult


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the family to the command line."""
    family = commands.add_parser("evaluate", help="measure models and samples").add_subparsers(
        title="what", metavar="WHAT", required=True
    )
    _add_reconstruction(family)
    _add_generation(family)
    _add_reference(family)
    _add_conventions(family)
    compare = family.add_parser(
        "compare",
        help="results of 'evaluate generation' side by side",
        description="Results of different references are refused.",
        epilog="example: ibq-scale evaluate compare b.json l.json",
    )
    compare.add_argument(
        "results", nargs="+", type=Path, metavar="FILE", help="generation.json, or the output of --json"
    )
    compare.add_argument("--json", action="store_true", help="print one JSON document")
    compare.set_defaults(run=_compare)


def _add_reconstruction(family: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = family.add_parser(
        "reconstruction",
        help="PSNR, SSIM, LPIPS, rFID and codebook usage of a tokenizer",
        description="Reconstruct a data set. The figures do not depend on the number of ranks.",
        epilog="example: ibq-scale evaluate reconstruction runs/tok s3://bucket/imagenet-val --json",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="run directory, checkpoint or exported model")
    parser.add_argument("data", metavar="DATA", help="folder or s3:// prefix from 'prepare images'")
    parser.add_argument(
        "--native",
        action="store_true",
        help="one image at a time at its own size, cropped to a multiple of the downsampling (default: centre crop)",
    )
    parser.add_argument(
        "--pixels",
        choices=("8bit", "float"),
        default="8bit",
        help="reconstructions as files hold them (default), or before rounding, as LPIPS and rFID were published",
    )
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="write reconstruction.json, images.jsonl (a line an image) and worst.png"
    )
    _add_usual(parser)
    parser.set_defaults(run=_reconstruction)


def _add_generation(family: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = family.add_parser(
        "generation",
        help="gFID, inception score, precision and recall of samples",
        description="Measure images against a reference. The figures do not depend on the number of ranks.",
        epilog="example: ibq-scale evaluate generation samples --reference imagenet-256.npz --json",
    )
    parser.add_argument(
        "samples", metavar="SAMPLES", help="folder of 'sample' or of pictures, .npz (arr_0), or prepared data"
    )
    parser.add_argument(
        "--reference",
        required=True,
        metavar="WHAT",
        help="file of 'evaluate reference', the usual suite's .npz, or images as for SAMPLES",
    )
    _add_resolution(parser)
    parser.add_argument("--to", type=Path, metavar="DIR", help="write generation.json, for 'report' and 'compare'")
    _add_usual(parser)
    parser.set_defaults(run=_generation)


def _add_reference(family: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = family.add_parser(
        "reference",
        help="statistics of real images, to measure samples against",
        description="Write moments and features of real images, stamped with their source.",
        epilog="example: ibq-scale evaluate reference s3://bucket/imagenet --resolution 256 --to imagenet-256.npz",
    )
    parser.add_argument("data", metavar="DATA", help="prepared data (all of it), folder of pictures, or .npz (arr_0)")
    parser.add_argument("--to", required=True, type=Path, metavar="FILE.npz")
    parser.add_argument(
        "--features",
        type=int,
        default=10_000,
        metavar="N",
        help="images with features kept for precision and recall (default 10000)",
    )
    _add_resolution(parser)
    _add_convention_names(parser)
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images at once on a rank (default 16)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_ranks(parser)
    parser.set_defaults(run=_reference)


def _add_conventions(family: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = family.add_parser(
        "conventions",
        help="the conventions of FID, and the one behind each published figure",
        description="Print resize, quantisation and extractor of each convention, and the source of published figures.",
        epilog="example: ibq-scale evaluate conventions",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_conventions)


def _add_convention_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--conventions",
        metavar="NAMES",
        help="all, or names with commas from 'evaluate conventions' (default torch-fidelity)",
    )


def _add_resolution(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resolution", type=int, metavar="SIDE", help="centre crop of prepared data, in pixels")


def _add_usual(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images at once on a rank (default 16)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    _add_convention_names(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_ranks(parser)


def _reconstruction(args: argparse.Namespace) -> int:
    from ibq_scale.distributed.environment import join
    from ibq_scale.evaluate.reconstruction import evaluate_reconstruction

    at_least_one(args, "batch", "limit")
    with join() as world:
        report = evaluate_reconstruction(
            args.checkpoint,
            args.data,
            world,
            batch=args.batch,
            limit=args.limit,
            native=args.native,
            pixels=args.pixels,
            to=args.to,
            conventions=args.conventions,
        )
        if not world.is_main:
            return 0
    if args.json:
        print(json.dumps(asdict(report)))
        return 0
    size = "native size" if report.resolution is None else f"centre crop {report.resolution}"
    print(f"images       {report.images} of {report.data}, {size}, {report.pixels} pixels")
    print(f"PSNR         {report.psnr:.3f} dB")
    print(f"SSIM         {report.ssim:.4f}")
    names = {"LPIPS VGG": "lpips", "LPIPS Alex": "lpips_alex", "rFID": "rfid"}
    for shown, name in names.items():
        print(f"{shown:<12} {_value(getattr(report, name), report.not_measured.get(name))}")
    _print_conventions(report.conventions)
    print(f"usage        {100 * report.usage:.2f} % of {report.codebook_size} codes")
    print(f"perplexity   {report.perplexity:.1f}")
    print(f"speed        {report.images_per_s:.1f} img/s")
    return 0


def _generation(args: argparse.Namespace) -> int:
    from ibq_scale.distributed.environment import join
    from ibq_scale.evaluate.generation import evaluate_generation

    at_least_one(args, "batch", "limit", "resolution")
    with join() as world:
        report = evaluate_generation(
            args.samples,
            args.reference,
            world,
            batch=args.batch,
            size=_size(args),
            limit=args.limit,
            to=args.to,
            conventions=args.conventions,
        )
        if not world.is_main:
            return 0
    if args.json:
        print(json.dumps(asdict(report)))
        return 0
    stamp = report.reference_stamp
    real = "unstamped: its source is unknown"
    if stamp is not None:
        real = (
            f"{stamp.images} images of {stamp.data}, crop {stamp.crop}, {stamp.resolution[0]} x {stamp.resolution[1]}"
        )
    print(f"images       {report.images} of {report.samples}, {report.resolution[0]} x {report.resolution[1]}")
    print(f"reference    {report.reference} ({real})")
    print(f"gFID         {report.fid:.4f}")
    spread = "" if report.inception_score_std is None else f" ± {report.inception_score_std:.4f} over ten splits"
    print(f"IS           {_value(report.inception_score, report.not_measured.get('inception_score'))}{spread}")
    for name in ("precision", "recall"):
        print(f"{name:<12} {_value(getattr(report, name), report.not_measured.get(name))}")
    _print_conventions(report.conventions)
    print(f"speed        {report.images_per_s:.1f} img/s")
    return 0


def _reference(args: argparse.Namespace) -> int:
    from ibq_scale.distributed.environment import join
    from ibq_scale.evaluate.reference import write_reference

    at_least_one(args, "batch", "features", "resolution")
    with join() as world:
        stamp = write_reference(
            args.data,
            args.to,
            _size(args),
            world,
            batch=args.batch,
            features=args.features,
            conventions=args.conventions,
        )
        if not world.is_main:
            return 0
    if args.json:
        print(json.dumps(asdict(stamp) | {"hash": stamp.hash}))
        return 0
    print(
        f"{args.to}: {stamp.images} images of {stamp.data}, crop {stamp.crop}, {stamp.resolution[0]} x "
        f"{stamp.resolution[1]}, features of {stamp.features} (reference {stamp.hash[:12]})"
    )
    return 0


def _conventions(args: argparse.Namespace) -> int:
    from ibq_scale.evaluate.conventions import CONVENTIONS, PUBLISHED

    texts = ("suite", "resize", "quantisation", "extractor")
    rows = [{"name": c.name, **{text: getattr(c, text) for text in texts}} for c in CONVENTIONS.values()]
    if args.json:
        print(json.dumps({"conventions": rows, "published": [asdict(p) for p in PUBLISHED]}))
        return 0
    for row in rows:
        print(row["name"])
        for text in texts:
            print(f"  {text:<12} {row[text]}")
    print("published figures: convention, reference, source")
    for p in PUBLISHED:
        print(f"  {p.figure}: {p.convention or 'not told'}, against {p.reference} ({p.source})")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from ibq_scale.evaluate.generation import load_results

    results = load_results(args.results)
    if args.json:
        print(json.dumps(results))
        return 0
    columns = {"fid": "gFID", "inception_score": "IS", "precision": "precision", "recall": "recall", "images": "images"}
    print(f"reference {results[0]['reference']} ({results[0]['reference_hash'][:12]})")
    print(" ".join(f"{shown:>10}" for shown in columns.values()))
    for path, result in zip(args.results, results, strict=True):
        values = (result.get(name) for name in columns)
        shown = ("-" if v is None else f"{v}" if isinstance(v, int) else f"{v:.4f}" for v in values)
        print(" ".join(f"{text:>10}" for text in shown), path)
    return 0


def _print_conventions(rows: list[ConventionResult]) -> None:
    """A line each, if there is more than the report's own."""
    for row in rows if len(rows) > 1 else ():
        figures = {"FID": row.fid, "sFID": row.sfid, "IS": row.inception_score}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if value is not None)
        print(f"{row.convention:<15} {shown or row.not_measured['fid']}")


def _size(args: argparse.Namespace) -> tuple[int, int] | None:
    return None if args.resolution is None else (args.resolution, args.resolution)


def _value(value: Any, fault: str | None) -> str:
    return f"{value:.4f}" if value is not None else f"not measured: {fault}"
