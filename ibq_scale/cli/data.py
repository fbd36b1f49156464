"""``ibq-scale prepare`` and ``ibq-scale data``: data sets made and looked at."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ibq_scale.cli import trace


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the families to the command line."""
    prepare = commands.add_parser("prepare", help="pictures → shards, index, manifest").add_subparsers(
        title="what", metavar="WHAT", required=True
    )
    images = prepare.add_parser(
        "images",
        help="an ImageFolder (one folder a class) → shards",
        epilog="example: ibq-scale prepare images imagenet/train --to s3://bucket/imagenet --workers 16",
    )
    images.add_argument("source", type=Path, metavar="SRC")
    images.add_argument("--to", required=True, metavar="URL", help="folder or s3://bucket/prefix")
    images.add_argument("--shard-mb", type=int, default=256, metavar="MB", help="size of a shard (default 256)")
    images.add_argument("--size", type=int, metavar="PIXELS", help="resize the shortest side and re-encode")
    images.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    images.add_argument("--seed", type=int, default=0, help="of the shuffle (default 0)")
    images.add_argument("--json", action="store_true", help="print one JSON document")
    images.set_defaults(run=_prepare)
    family = commands.add_parser("data", help="check and describe a prepared data set").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    verify = family.add_parser(
        "verify", help="hash every shard again", epilog="example: ibq-scale data verify s3://bucket/imagenet"
    )
    verify.add_argument("url", metavar="URL")
    verify.set_defaults(run=_verify)
    stats = family.add_parser("stats", help="counts", epilog="example: ibq-scale data stats s3://bucket/imagenet")
    stats.add_argument("url", metavar="URL")
    stats.add_argument("--json", action="store_true", help="print one JSON document")
    stats.set_defaults(run=_stats)
    trace.add_command(family)


def _prepare(args: argparse.Namespace) -> int:
    from ibq_scale.data.prepare import REJECTS, prepare_images
    from ibq_scale.errors import UserError

    if min(args.shard_mb, args.workers, args.size or 1) < 1:
        raise UserError("--shard-mb, --workers and --size must be at least 1")
    report = prepare_images(
        args.source, args.to, shard_bytes=args.shard_mb << 20, workers=args.workers, size=args.size, seed=args.seed
    )
    if args.json:
        print(json.dumps(asdict(report)))
        return 0
    reused = f" ({report.reused_shards} from an earlier run)" if report.reused_shards else ""
    print(
        f"{report.url}: {report.samples} images of {report.classes} classes in {report.shards} shards{reused}, "
        f"{report.bytes / 2**20:.1f} MiB"
    )
    if report.rejected:
        print(f"{report.rejected} files are no images: {report.url}/{REJECTS}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ibq_scale.data.verify import verify

    faults = verify(args.url)
    print("\n".join(faults) if faults else f"{args.url}: every shard is what the manifest says")
    return 1 if faults else 0


def _stats(args: argparse.Namespace) -> int:
    from ibq_scale.data.verify import describe

    facts = describe(args.url)
    if args.json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{name:<10} {value}" for name, value in facts.items()))
    return 0
