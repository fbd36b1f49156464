"""Options of several commands: numbers, and the ranks of this node."""

from __future__ import annotations

import argparse
import math
import os
from typing import Any

from ibq_scale.errors import UserError


class _Ranks(argparse.Action):
    """Stores the number. In a Slurm step of one task, as in the shell of ``srun --pty bash``, Slurm's variables
    describe a single rank. They are dropped, and the command starts its own ranks.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        if "RANK" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS")) == "1":
            for name in ("SLURM_PROCID", "SLURM_STEP_ID"):
                os.environ.pop(name, None)


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """Marks a command as distributed. `cli.main` starts its ranks if no launcher did."""
    parser.add_argument(
        "--ranks",
        type=int,
        action=_Ranks,
        default=None,
        metavar="N",
        help="processes on this node (default: one a GPU, or 1)",
    )
    parser.set_defaults(distributed=True)


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """UserError where one of these options is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def finite(text: str) -> float:
    """A finite number. ``nan`` would spread through all results without a message."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return value
