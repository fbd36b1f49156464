"""``ibq-scale experiments``: the paper's experiments at a small scale, and their document."""

from __future__ import annotations

import argparse
from pathlib import Path

from ibq_scale.errors import UserError


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the family to the command line."""
    family = commands.add_parser("experiments", help="the paper's experiments in small").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    run = family.add_parser(
        "run",
        help="train and evaluate every configuration, or some, with each seed",
        description="Run it again to go on: finished runs are skipped.",
        epilog="example: ibq-scale experiments run photographs/ --only ibq-1024 vq-1024 --seeds 0 1",
    )
    run.add_argument("pictures", type=Path, metavar="PICTURES", help="folder of photographs, cut into tiles")
    run.add_argument(
        "--to", type=Path, default=Path("runs/experiments"), metavar="DIR", help="default: runs/experiments"
    )
    run.add_argument("--only", nargs="+", default=[], metavar="NAME", help="configurations (default: all)")
    run.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: 0 1 2")
    run.set_defaults(run=_run)
    listed = family.add_parser(
        "list",
        help="the configurations and their overrides of the preset",
        epilog="example: ibq-scale experiments list",
    )
    listed.set_defaults(run=_list)
    report = family.add_parser(
        "report",
        help="collect finished runs, draw the figures and fill the tables of docs/experiments.md",
        epilog="example: ibq-scale experiments report --runs runs/experiments --docs docs",
    )
    report.add_argument("--runs", type=Path, metavar="DIR", help="collect these first (default: use earlier results)")
    report.add_argument("--docs", type=Path, default=Path("docs"), metavar="DIR", help="default: docs")
    report.set_defaults(run=_report)


def _run(args: argparse.Namespace) -> int:
    from ibq_scale.experiments.plan import SEEDS, trials
    from ibq_scale.experiments.run import run_trials

    if any(seed < 0 for seed in args.seeds or ()):
        raise UserError("--seeds must be 0 or more")
    return run_trials(args.pictures, args.to, trials(args.only, args.seeds or SEEDS))


def _list(args: argparse.Namespace) -> int:
    from ibq_scale.experiments.plan import CONFIGURATIONS, PRESET

    for configuration in CONFIGURATIONS:
        print(f"{configuration.name:<16} {configuration.pictures:<12} {' '.join(configuration.overrides) or PRESET}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from ibq_scale.experiments.document import write_document
    from ibq_scale.experiments.results import RESULTS, collect, save

    if args.runs is not None:
        save(collect(args.runs), args.docs / RESULTS)
    for path in write_document(args.docs):
        print(path)
    return 0
