"""``ibq-scale data trace``: the samples of a step."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ibq_scale.documents import read_json


def add_command(family: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the family ``data``."""
    parser = family.add_parser(
        "trace",
        help="the samples of a training step, by rank",
        description="Name the samples of one optimizer step, from the run's config and the data's manifests alone.",
        epilog="example: ibq-scale data trace runs/tok --step 12345",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    parser.add_argument("--step", type=int, required=True, metavar="S", help="as in metrics.jsonl; 1 is the first")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks of that step (default: of the run's last start)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_trace)


def _trace(args: argparse.Namespace) -> int:
    from ibq_scale.cli.options import at_least_one
    from ibq_scale.data.trace import trace

    at_least_one(args, "ranks")
    found = trace(args.run_dir, args.step, args.ranks or _ranks_of(args.run_dir))
    if args.json:
        print(json.dumps([asdict(sample) for sample in found]))
        return 0
    print(f"{'rank':>5} {'position':>12} {'epoch':>6} {'row':>6}  {'label':>6}  shard, key, file")
    for s in found:
        names = ", ".join(part for part in (s.shard, s.key, s.source) if part)
        label = "" if s.label is None else s.label
        print(f"{s.rank:>5} {s.position:>12} {s.epoch:>6} {s.row:>6}  {label:>6}  {names}")
    return 0


def _ranks_of(run_dir: Path) -> int:
    try:
        return int(read_json(run_dir / "environment.json")["world_size"])
    except (OSError, ValueError, KeyError):
        return 1
