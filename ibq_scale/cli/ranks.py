"""Commands that run on several ranks, and how they get there."""

from __future__ import annotations

import argparse

from ibq_scale.errors import UserError


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """Marks a command as one that runs on several ranks; `cli.main` launches them where no launcher did."""
    parser.add_argument(
        "--ranks",
        type=int,
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
