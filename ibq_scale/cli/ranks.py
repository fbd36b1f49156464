"""Commands that run on several ranks, and how they get there."""

from __future__ import annotations

import argparse


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
