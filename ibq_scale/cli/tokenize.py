"""``ibq-scale tokenize``: images → code shards."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ibq_scale.cli.ranks import add_ranks


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "tokenize",
        help="images → code shards, by a trained tokenizer",
        description="Encode a prepared data set. Run the same command again to go on after a stop.",
        epilog="example: ibq-scale tokenize runs/tok s3://bucket/imagenet --to s3://bucket/imagenet-codes",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="run directory, checkpoint or exported model")
    parser.add_argument("data", metavar="DATA", help="folder or s3:// prefix that 'prepare images' wrote")
    parser.add_argument("--to", required=True, metavar="URL", help="folder or s3://bucket/prefix for the codes")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images at once on a rank (default 32)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_ranks(parser)
    parser.set_defaults(run=_tokenize)


def _tokenize(args: argparse.Namespace) -> int:
    from ibq_scale.cli.ranks import at_least_one
    from ibq_scale.distributed.environment import join
    from ibq_scale.generate.codes import tokenize

    at_least_one(args, "batch")
    with join() as world:
        report = tokenize(args.checkpoint, args.data, args.to, world, batch=args.batch)
        if not world.is_main:
            return 0
    if args.json:
        print(json.dumps(asdict(report)))
        return 0
    reused = f" ({report.reused_shards} shards from an earlier run)" if report.reused_shards else ""
    h, w = report.grid
    print(
        f"{report.url}: {report.images} images as {h}×{w} codes in {report.shards} shards{reused}, "
        f"{report.images_per_s:.1f} img/s; usage {100 * report.usage:.1f} % of {report.codebook_size}"
    )
    return 0
