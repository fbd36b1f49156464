"""``ibq-scale prepare`` and ``ibq-scale data``: make, adopt, check and describe data sets."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibq_scale.cli import trace
from ibq_scale.cli.options import finite
from ibq_scale.console import gigabytes

if TYPE_CHECKING:
    from ibq_scale.data.prepare import PrepareReport

WHERE = "keep samples with, e.g., 'width>=256', 'aspect<=2' or a column's 'aesthetic>=5.5'; may be repeated"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the families to the command line."""
    prepare = commands.add_parser("prepare", help="pictures → shards, index, manifest").add_subparsers(
        title="what", metavar="WHAT", required=True
    )
    images = prepare.add_parser(
        "images",
        help="an ImageFolder, webdataset tars or parquet → shards",
        epilog="example: ibq-scale prepare images imagenet/train --to s3://bucket/imagenet --workers 16",
    )
    images.add_argument(
        "source", metavar="SRC", help="ImageFolder, .tar or .parquet files: a folder, file or 'pattern', local or s3://"
    )
    images.add_argument("--to", required=True, metavar="URL", help="folder or s3://bucket/prefix")
    images.add_argument("--shard-mb", type=int, default=64, metavar="MB", help="most of a shard's input (default 64)")
    images.add_argument("--size", type=int, metavar="PIXELS", help="resize the shortest side and re-encode")
    images.add_argument(
        "--aspects",
        metavar="W:H,…",
        help="shards of one aspect each, for a tokenizer's data.aspects: 3:4,1:1,4:3 (--shard-mb is of all together)",
    )
    _add_source_options(images)
    images.add_argument("--dry-run", action="store_true", help="only look: list the contents and the planned choice")
    images.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    images.add_argument("--seed", type=int, default=0, help="of the shuffle (default 0)")
    images.add_argument("--json", action="store_true", help="print one JSON document")
    images.set_defaults(run=_prepare)
    family = commands.add_parser("data", help="adopt, check and describe data sets").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    _add_data_commands(family)


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    """Options for the choice of pictures and labels from a source."""
    parser.add_argument("--where", action="append", default=[], metavar="CONDITION", help=WHERE)
    parser.add_argument(
        "--label",
        metavar="KEY",
        help="labels from this key of json, member of the tar, or column of parquet or a .csv beside the pictures; "
        "'folder': class folders in tars; 'none': no labels",
    )
    parser.add_argument("--classes", metavar="URL", help="class numbers of this data set: for held-out pictures")
    parser.add_argument(
        "--key",
        choices=("dot", "stem"),
        default="dot",
        help="a tar's sample is named up to the first dot, as webdataset does (default), or up to the last",
    )
    parser.add_argument("--picture", metavar="MEMBER", help="of a tar's sample, like image.png (default: by a rule)")
    parser.add_argument("--max-aspect", type=finite, default=0.0, metavar="RATIO", help="leave out longer pictures")
    parser.add_argument(
        "--background", default="white", metavar="COLOUR", help="under transparent pictures (default white)"
    )


def _add_data_commands(family: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    index = family.add_parser(
        "index",
        help="make others' webdataset tars a data set, without rewriting them",
        epilog="example: ibq-scale data index s3://bucket/laion --where 'aesthetic>=5.5' --workers 16",
    )
    index.add_argument("url", metavar="URL", help="their folder: indices and manifest are written there")
    _add_source_options(index)
    index.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    index.add_argument("--json", action="store_true", help="print one JSON document")
    index.set_defaults(run=_index)
    verify = family.add_parser(
        "verify",
        help="read every shard and every sample again",
        epilog="example: ibq-scale data verify s3://bucket/imagenet",
    )
    verify.add_argument("url", metavar="URL")
    verify.add_argument("--workers", type=int, default=4, metavar="N", help="threads (default 4)")
    verify.add_argument("--json", action="store_true", help="print one JSON document")
    verify.set_defaults(run=_verify)
    stats = family.add_parser(
        "stats",
        help="counts, picture sizes, labels, a contact sheet",
        epilog="example: ibq-scale data stats s3://bucket/imagenet --sheet imagenet.png",
    )
    stats.add_argument("url", metavar="URL")
    stats.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw random samples")
    stats.add_argument("--images", type=int, default=64, metavar="N", help="on the sheet (default 64)")
    stats.add_argument("--seed", type=int, default=0, help="of the choice (default 0)")
    stats.add_argument("--json", action="store_true", help="print one JSON document")
    stats.set_defaults(run=_stats)
    trace.add_command(family)


def _prepare(args: argparse.Namespace) -> int:
    from ibq_scale.data.look import look_only
    from ibq_scale.data.prepare import prepare_images

    _at_least_one(args, "shard_mb", "workers", "size")
    options = _source_options(args)
    if args.dry_run:
        del options["rules"]
        seen = look_only(args.source, **options)
        print(json.dumps(seen.model_dump(mode="json")) if args.json else "\n".join(seen.lines()))
        return 0
    options["aspects"] = args.aspects.split(",") if args.aspects else ()
    report = prepare_images(
        args.source, args.to, shard_bytes=args.shard_mb << 20, size=args.size, seed=args.seed, **options
    )
    return _print_report(report, args.json)


def _index(args: argparse.Namespace) -> int:
    from ibq_scale.data.adopt import adopt_tars

    _at_least_one(args, "workers")
    return _print_report(adopt_tars(args.url, **_source_options(args)), args.json)


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


def _print_report(report: PrepareReport, as_json: bool) -> int:
    from ibq_scale.data.look import REJECTS

    if as_json:
        print(json.dumps({**asdict(report), "seen": report.seen.model_dump(mode="json")}))
        return 0
    reused = f" ({report.reused_shards} from an earlier run)" if report.reused_shards else ""
    print(
        f"{report.url}: {report.samples:,} images of {report.classes:,} classes in {report.shards:,} shards{reused}, "
        f"{gigabytes(report.bytes)}"
    )
    print("\n".join(report.seen.lines()))
    if report.rejected:
        print(f"{report.rejected:,} are no usable images: {report.url}/{REJECTS}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ibq_scale.data.verify import verify

    _at_least_one(args, "workers")
    verified = verify(args.url, workers=args.workers)
    if args.json:
        print(json.dumps(asdict(verified)))
    else:
        read = f"{verified.shards:,} shards, {verified.samples:,} samples, {gigabytes(verified.bytes)}"
        end = f"{len(verified.faults)} faults" if verified.faults else "all bytes are as prepared"
        print("\n".join([*verified.faults, f"{verified.url}: {read}: {end}"]))
    return 1 if verified.faults else 0


def _stats(args: argparse.Namespace) -> int:
    from ibq_scale.data.describe import as_text, describe

    _at_least_one(args, "images")
    described = describe(args.url, pick=args.images if args.sheet else 0, seed=args.seed)
    print(json.dumps(described.facts) if args.json else as_text(described))
    if args.sheet:
        from ibq_scale.data.sheet import save_sheet

        save_sheet(args.sheet, described.picked, described.classes, described.rules)
    return 0


def _at_least_one(args: argparse.Namespace, *names: str) -> None:
    from ibq_scale.errors import UserError

    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
