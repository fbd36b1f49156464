"""``ibq-scale report``: one offline HTML page of one or several runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "report",
        help="curves, pictures and tables of runs as one offline HTML page",
        epilog="example: ibq-scale report runs/ibq runs/vq --out compare.html",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from ibq_scale.report.compare import write_report

    print(write_report(args.runs, args.out or args.runs[0] / "report.html"))
    return 0
