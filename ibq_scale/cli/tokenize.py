"""``ibq-scale tokenize``: images → code shards."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ibq_scale.cli.options import add_ranks
from ibq_scale.errors import UserError


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "tokenize",
        help="images → code shards, by a trained tokenizer",
        description="Encode a prepared data set. Run the same command again to go on after a stop.",
        epilog="example: ibq-scale tokenize runs/tok s3://bucket/imagenet --to s3://bucket/imagenet-codes",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="run directory, checkpoint or exported model")
    parser.add_argument("data", metavar="DATA", help="folder or s3:// prefix from 'prepare images'")
    parser.add_argument("--to", required=True, metavar="URL", help="folder or s3://bucket/prefix for the codes")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images at once on a rank (default 32)")
    parser.add_argument(
        "--crops", choices=("center", "ten"), default="center", help="ten: corners, centre, and mirrored (LlamaGen)"
    )
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="only every N-th shard from I on: for an array of jobs"
    )
    parser.add_argument(
        "--captions",
        metavar="FILE",
        help="store conditions for model.conditioning=embedding: lines of KEY, a tab and the caption (KEY: the image's "
        "key, path or class), or 'classes' for the names of the classes",
    )
    parser.add_argument(
        "--encoder",
        default="hash",
        metavar="NAME",
        help="text encoder: hash (default), t5:NAME or clip:NAME of the Hub",
    )
    parser.add_argument(
        "--caption-tokens", type=int, metavar="N", help="most vectors a caption (default: the encoder's)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_ranks(parser)
    parser.set_defaults(run=_tokenize, check=_check)


def parse_part(text: str) -> tuple[int, int]:
    """``3/16`` → (3, 16). UserError if unreadable."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--part {text}: write I/N with 0 ≤ I < N, for example 0/16 to 15/16")
    return int(index), int(count)


def _check(args: argparse.Namespace) -> None:
    from ibq_scale.cli.options import at_least_one

    at_least_one(args, "batch", *(["caption_tokens"] if args.caption_tokens is not None else []))
    parse_part(args.part)


def _tokenize(args: argparse.Namespace) -> int:
    from ibq_scale.distributed.environment import join
    from ibq_scale.generate.codes import tokenize

    _check(args)
    part = parse_part(args.part)
    with join() as world:
        texts = {"captions": args.captions, "encoder": args.encoder, "caption_tokens": args.caption_tokens}
        how = {"batch": args.batch, "crops": args.crops, "part": part}
        report = tokenize(args.checkpoint, args.data, args.to, world, **how, **texts)
        if not world.is_main:
            return 0
    if args.json:
        print(json.dumps(asdict(report)))
        return 0
    reused = f" ({report.reused_shards} shards from an earlier run)" if report.reused_shards else ""
    h, w = report.grid
    each = f" of {report.crops} crops each" if report.crops > 1 else ""
    print(
        f"{report.url}: {report.images} images{each} as {h}×{w} codes in {report.shards} shards{reused}, "
        f"{report.images_per_s:.1f} img/s; usage {100 * report.usage:.1f} % of {report.codebook_size}"
    )
    if not report.complete:
        print(f"other parts are missing: the last one to end writes {report.url}/manifest.json")
    return 0
