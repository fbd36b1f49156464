"""``ibq-scale prepare`` and ``ibq-scale data``: make, adopt, check and describe data sets."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibq_scale.cli.options import JSON, Commands, Family, argument, finite, flag, show, whole
from ibq_scale.console import gigabytes

if TYPE_CHECKING:
    from ibq_scale.data.prepare import PrepareReport
    from ibq_scale.data.trace import Traced

URL = argument("url", metavar="URL")
WORKERS = whole("--workers", "processes", 1)
# The choice of pictures and labels from a source.
CHOICE = (
    argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="keep samples with, e.g., 'width>=256', 'aspect<=2' or a column's 'aesthetic>=5.5'; may be repeated",
    ),
    argument(
        "--label",
        metavar="KEY",
        help="labels from this key of json, member of the tar, or column of parquet or a .csv beside the pictures; "
        "'folder': class folders in tars; 'none': no labels",
    ),
    argument("--classes", metavar="URL", help="class numbers of this data set: for held-out pictures"),
    argument(
        "--key",
        choices=("dot", "stem"),
        default="dot",
        help="a tar's sample is named up to the first dot, as webdataset does (default), or up to the last",
    ),
    argument("--picture", metavar="MEMBER", help="of a tar's sample, like image.png (default: by a rule)"),
    argument("--max-aspect", type=finite, default=0.0, metavar="RATIO", help="leave out longer pictures"),
    argument("--background", default="white", metavar="COLOUR", help="under transparent pictures (default white)"),
)
PREPARE = Family("prepare", "pictures → shards, index, manifest", "what", "WHAT")
FAMILY = Family("data", "adopt, check and describe data sets")


@PREPARE.command(
    "an ImageFolder, webdataset tars or parquet → shards",
    "imagenet/train --to s3://bucket/imagenet --workers 16",
    argument(
        "source", metavar="SRC", help="ImageFolder, .tar or .parquet files: a folder, file or 'pattern', local or s3://"
    ),
    argument("--to", required=True, metavar="URL", help="folder or s3://bucket/prefix"),
    whole("--shard-mb", "most of a shard's input", 64, metavar="MB"),
    whole("--size", "resize the shortest side and re-encode", metavar="PIXELS"),
    argument(
        "--aspects",
        metavar="W:H,…",
        help="shards of one aspect each, for a tokenizer's data.aspects: 3:4,1:1,4:3 (--shard-mb is of all together)",
    ),
    *CHOICE,
    flag("--dry-run", "only look: list the contents and the planned choice"),
    WORKERS,
    argument("--seed", type=int, default=0, help="of the shuffle (default 0)"),
    JSON,
    name="images",
)
def _prepare(args: argparse.Namespace) -> int:
    from ibq_scale.data.look import look_only
    from ibq_scale.data.prepare import prepare_images

    options = _source_options(args)
    if args.dry_run:
        del options["rules"]
        seen = look_only(args.source, **options)
        return show(args, seen.model_dump(mode="json"), seen.lines())
    options["aspects"] = args.aspects.split(",") if args.aspects else ()
    report = prepare_images(
        args.source, args.to, shard_bytes=args.shard_mb << 20, size=args.size, seed=args.seed, **options
    )
    return _show_report(args, report)


@FAMILY.command(
    "make others' webdataset tars a data set, without rewriting them",
    "s3://bucket/laion --where 'aesthetic>=5.5' --workers 16",
    argument("url", metavar="URL", help="their folder: indices and manifest are written there"),
    *CHOICE,
    WORKERS,
    JSON,
)
def _index(args: argparse.Namespace) -> int:
    from ibq_scale.data.adopt import adopt_tars

    return _show_report(args, adopt_tars(args.url, **_source_options(args)))


def _source_options(args: argparse.Namespace) -> dict[str, Any]:
    from ibq_scale.data.convert import parse_colour
    from ibq_scale.data.pixel_rules import PixelRules
    from ibq_scale.data.tars import Naming
    from ibq_scale.errors import UserError

    if args.max_aspect and not args.max_aspect >= 1:
        raise UserError(f"--max-aspect {args.max_aspect}: longer side over shorter, at least 1")
    return {
        "workers": args.workers,
        "where": args.where,
        "naming": Naming(stem=args.key == "stem", picture=args.picture, label=args.label),
        "classes": args.classes,
        "max_aspect": args.max_aspect,
        "rules": PixelRules(background=parse_colour(args.background)),
    }


def _show_report(args: argparse.Namespace, report: PrepareReport) -> int:
    from dataclasses import asdict

    from ibq_scale.data.look import REJECTS

    reused = f" ({report.reused_shards} from an earlier run)" if report.reused_shards else ""
    lines = [
        f"{report.url}: {report.samples:,} images of {report.classes:,} classes in {report.shards:,} shards{reused}, "
        f"{gigabytes(report.bytes)}",
        *report.seen.lines(),
    ]
    if report.rejected:
        lines.append(f"{report.rejected:,} are no usable images: {report.url}/{REJECTS}")
    return show(args, asdict(report) | {"seen": report.seen.model_dump(mode="json")}, lines)


@FAMILY.command(
    "read every shard and every sample again", "s3://bucket/imagenet", URL, whole("--workers", "threads", 4), JSON
)
def _verify(args: argparse.Namespace) -> int:
    from ibq_scale.data.verify import verify

    verified = verify(args.url, workers=args.workers)
    read = f"{verified.shards:,} shards, {verified.samples:,} samples, {gigabytes(verified.bytes)}"
    end = f"{len(verified.faults)} faults" if verified.faults else "all bytes are as prepared"
    show(args, verified, [*verified.faults, f"{verified.url}: {read}: {end}"])
    return 1 if verified.faults else 0


@FAMILY.command(
    "counts, picture sizes, labels, a contact sheet",
    "s3://bucket/imagenet --sheet imagenet.png",
    URL,
    argument("--sheet", type=Path, metavar="FILE.png", help="draw random samples"),
    whole("--images", "on the sheet", 64),
    argument("--seed", type=int, default=0, help="of the choice (default 0)"),
    JSON,
)
def _stats(args: argparse.Namespace) -> int:
    from ibq_scale.data.describe import as_text, describe

    described = describe(args.url, pick=args.images if args.sheet else 0, seed=args.seed)
    show(args, described.facts, [as_text(described)])
    if args.sheet:
        from ibq_scale.data.sheet import save_sheet

        save_sheet(args.sheet, described.picked, described.classes, described.rules)
    return 0


@FAMILY.command(
    "the samples of a training step, by rank",
    "runs/tok --step 12345",
    argument("run_dir", type=Path, metavar="RUN"),
    argument("--step", type=int, required=True, metavar="S", help="as in metrics.jsonl; 1 is the first"),
    whole("--ranks", "ranks of that step (default: of the run's last start)"),
    JSON,
)
def _trace(args: argparse.Namespace) -> int:
    """Name the samples of one optimizer step, from the run's config and the data's manifests alone."""
    from ibq_scale.data.trace import trace

    found = trace(args.run_dir, args.step, args.ranks or _ranks_of(args.run_dir))
    return show(args, found, _trace_lines(found))


def _trace_lines(found: list[Traced]) -> Iterator[str]:
    yield f"{'rank':>5} {'position':>12} {'epoch':>6} {'row':>6}  {'label':>6}  shard, key, file"
    for s in found:
        names = ", ".join(part for part in (s.shard, s.key, s.source) if part)
        label = "" if s.label is None else s.label
        yield f"{s.rank:>5} {s.position:>12} {s.epoch:>6} {s.row:>6}  {label:>6}  {names}"


def _ranks_of(run_dir: Path) -> int:
    from ibq_scale.documents import json_object

    ranks = json_object(run_dir / "environment.json").get("world_size")
    return ranks if isinstance(ranks, int) else 1


def add_commands(commands: Commands) -> None:
    PREPARE.add_commands(commands)
    FAMILY.add_commands(commands)
