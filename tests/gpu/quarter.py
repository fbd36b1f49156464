"""Runs every part once on one GPU, in the order of its value: ``tests/gpu/quarter.sh OUT``.

A stage is a list of commands. Each command has a time limit of its own and adds a row to OUT/summary.json as it ends.
A command that fails or takes too long does not end the others. The total is bounded: a command that does not fit into
the seconds that are left runs with what is left, or is named as not run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.gpu.stages import Command, Options, stages

LEAST_S = 10.0
"""A command is not started with less."""
TAIL = 2_000


@dataclass(frozen=True)
class Row:
    """A finished command. `figures`: the JSON that it printed last, or pytest's counts."""

    stage: str
    name: str
    argv: tuple[str, ...]
    outcome: str
    """`ok`, `failed`, `too long` or `not run`."""
    seconds: float
    limit_s: float
    figures: Any
    tail: str
    """The end of the output, where the outcome is not `ok`."""


def run(command: Command, stage: str, seconds_left: float, log: Path) -> Row:
    """One command in a session of its own, all of which ends with its limit."""
    limit_s = min(command.limit_s, seconds_left)
    if limit_s < LEAST_S:
        return Row(stage, command.name, command.argv, "not run", 0.0, limit_s, None, "no time left")
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command.argv, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | command.env
        )
        try:
            code = process.wait(limit_s)
            outcome = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome = "too long"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    seconds = time.monotonic() - began
    with log.open("a", encoding="utf-8") as file:
        file.write(f"=== {stage}: {command.name}: {outcome} after {seconds:.1f} s\n{' '.join(command.argv)}\n{text}\n")
    tail = "" if outcome == "ok" else text[-TAIL:]
    return Row(stage, command.name, command.argv, outcome, seconds, limit_s, figures_of(text), tail)


def figures_of(text: str) -> Any:
    """The last line that is JSON, or the counts of pytest's last line, or None."""
    for line in reversed(text.splitlines()):
        if line.startswith(("{", "[")):
            try:
                return json.loads(line)
            except ValueError:
                continue
        if counts := re.findall(r"(\d+) (passed|failed|skipped|errors?)", line):
            return {word: int(number) for number, word in counts}
    return None


def write(path: Path, rows: Sequence[Row], began: float) -> None:
    """Replaces the summary at once, so that a run that is cut short leaves a whole file."""
    found = {"seconds": time.monotonic() - began, "rows": [asdict(row) for row in rows]}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
    partial.replace(path)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="tests/gpu/quarter.sh")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of summary.json and log.txt")
    parser.add_argument("--seconds", type=float, default=720.0, help="for everything (default 720)")
    parser.add_argument("--stages", default="", help="some of them, by name (default: all)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a machine without a GPU")
    parser.add_argument("--pictures", type=Path, help="an ImageFolder for `usage` (default: drawn pictures)")
    parser.add_argument("--published", type=Path, help="a checkout of the published code, to measure beside ours")
    args = parser.parse_args(words)
    args.out.mkdir(parents=True, exist_ok=True)
    began, rows = time.monotonic(), list[Row]()
    with tempfile.TemporaryDirectory() as work:
        known = stages(Options(Path(work), args.out, args.small, args.pictures, args.published))
        chosen = args.stages.split(",") if args.stages else list(known)
        if unknown := set(chosen) - set(known):
            parser.error(f"--stages: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
        for stage in chosen:
            for command in known[stage]:
                left = args.seconds - (time.monotonic() - began)
                row = run(command, stage, left, args.out / "log.txt")
                rows.append(row)
                write(args.out / "summary.json", rows, began)
                print(f"{stage:<12}{row.name:<28}{row.outcome:<10}{row.seconds:7.1f} s", flush=True)
    return 0 if all(row.outcome == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
