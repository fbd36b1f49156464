"""``ibq-scale train``: both stages."""

from __future__ import annotations

import argparse
import sys

from ibq_scale.cli.options import OVERRIDES, RANKS, Family, argument

FAMILY = Family("train", "train a tokenizer or an AR transformer", "stages", "STAGE")
add_commands = FAMILY.add_commands
SOURCE = argument("source", metavar="PRESET_OR_YAML", help="STAGE/NAME, or NAME alone")


def _check(args: argparse.Namespace) -> None:
    """Refuses wrong configs and runs without their pretrained weights before any rank starts."""
    from ibq_scale.config.layers import require_complete, resolve
    from ibq_scale.losses.weights import files_of_run, weight_file

    config = resolve(args.source, args.overrides, args.task).config
    require_complete(config)
    for name in files_of_run(config):
        weight_file(name)


@FAMILY.command(
    "stage 2: the transformer on its codes",
    "ar/xl data.train=s3://bucket/imagenet-codes out=runs/xl",
    SOURCE,
    OVERRIDES,
    RANKS,
    name="ar",
    check=_check,
    task="ar",
)
@FAMILY.command(
    "stage 1: the image tokenizer",
    "tokenizer/ibq-16384 data.train=s3://bucket/imagenet out=runs/tok",
    SOURCE,
    OVERRIDES,
    RANKS,
    name="tokenizer",
    check=_check,
    task="tokenizer",
)
def _train(args: argparse.Namespace) -> int:
    """Train a stage. Run the same command again to resume from the newest whole checkpoint."""
    from contextlib import closing
    from pathlib import Path

    from ibq_scale.config.layers import resolve
    from ibq_scale.distributed.environment import join
    from ibq_scale.supervise.preemption import StopRequest

    config = resolve(args.source, args.overrides, args.task).config
    # Before the import of torch and the rendezvous of the ranks, since either may take minutes.
    with closing(StopRequest(config.train.grace)) as stop, join(Path(config.run_dir)) as world:
        from ibq_scale.train.run import run_training

        return run_training(config, world, stop, [sys.executable, "-m", "ibq_scale", *sys.argv[1:]])
