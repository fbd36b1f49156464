"""``ibq-scale report``: one offline HTML page of one or several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ibq_scale.cli.options import Family, argument

COMMAND = Family()
add_commands = COMMAND.add_commands


@COMMAND.command(
    "curves, pictures and tables of runs as one offline HTML page",
    "runs/ibq runs/vq --out compare.html",
    argument("runs", nargs="+", type=Path, metavar="RUN"),
    argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run"),
)
def _report(args: argparse.Namespace) -> int:
    from ibq_scale.report.compare import write_report

    print(write_report(args.runs, args.out or args.runs[0] / "report.html"))
    return 0
