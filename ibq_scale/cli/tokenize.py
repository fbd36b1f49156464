"""``ibq-scale tokenize``: images → code shards."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ibq_scale.cli.options import JSON, RANKS, Argument, Checked, Family, argument, show, whole
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.generate.codes import TokenizeReport
COMMAND = Family()
add_commands = COMMAND.add_commands


def part(about: str) -> Argument:
    """``--part 3/16`` as (3, 16). UserError if unreadable."""
    return argument("--part", default=(0, 1), action=Checked, check=_part, metavar="I/N", help=about)


def _part(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--part {text}: write I/N with 0 ≤ I < N, for example 0/16 to 15/16")
    return int(index), int(count)


@COMMAND.command(
    "images → code shards, by a trained tokenizer",
    "runs/tok s3://bucket/imagenet --to s3://bucket/imagenet-codes",
    argument("checkpoint", metavar="CKPT", help="run directory, checkpoint or exported model"),
    argument("data", metavar="DATA", help="folder or s3:// prefix from 'prepare images'"),
    argument("--to", required=True, metavar="URL", help="folder or s3://bucket/prefix for the codes"),
    whole("--batch", "images at once on a rank", 32),
    argument(
        "--crops", choices=("center", "ten"), default="center", help="ten: corners, centre, and mirrored (LlamaGen)"
    ),
    part("only every N-th shard from I on: for an array of jobs"),
    argument(
        "--captions",
        metavar="FILE",
        help="store conditions for model.conditioning=embedding: lines of KEY, a tab and the caption (KEY: the "
        "image's key, path or class), or 'classes' for the names of the classes",
    ),
    argument(
        "--encoder",
        default="hash",
        metavar="NAME",
        help="text encoder: hash (default), t5:NAME or clip:NAME, a name on the Hub or a folder",
    ),
    whole("--caption-tokens", "most vectors a caption (default: the encoder's)"),
    JSON,
    RANKS,
)
def _tokenize(args: argparse.Namespace) -> int:
    """Encode a prepared data set. Run the same command again to go on after a stop."""
    from ibq_scale.distributed.environment import join
    from ibq_scale.generate.codes import tokenize

    with join() as world:
        texts = {"captions": args.captions, "encoder": args.encoder, "caption_tokens": args.caption_tokens}
        how = {"batch": args.batch, "crops": args.crops, "part": args.part}
        report = tokenize(args.checkpoint, args.data, args.to, world, **how, **texts)
        return show(args, report, _lines(report)) if world.is_main else 0


def _lines(report: TokenizeReport) -> Iterator[str]:
    reused = f" ({report.reused_shards} shards from an earlier run)" if report.reused_shards else ""
    h, w = report.grid
    each = f" of {report.crops} crops each" if report.crops > 1 else ""
    yield (
        f"{report.url}: {report.images} images{each} as {h}×{w} codes in {report.shards} shards{reused}, "
        f"{report.images_per_s:.1f} img/s; usage {100 * report.usage:.1f} % of {report.codebook_size}"
    )
    if not report.complete:
        yield f"other parts are missing: the last one to end writes {report.url}/manifest.json"
