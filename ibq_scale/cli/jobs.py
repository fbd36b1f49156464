"""``ibq-scale jobs`` and ``cancel``: the state of runs, and a stop with a save."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ibq_scale.cli.options import JSON, Family, argument, flag, show
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.cluster.runs import Run

COLUMNS = ("run", "state", "step", "rate", "ETA", "checkpoint", "job", "nodes")
COMMAND = Family()
add_commands = COMMAND.add_commands


@COMMAND.command(
    "runs and how they stand", "runs/tok runs/xl", argument("runs", nargs="*", type=Path, metavar="RUN"), JSON
)
def _jobs(args: argparse.Namespace) -> int:
    """State, step, rate, time left, newest checkpoint, job and nodes of runs: from Slurm's queue, and from the run
    directories. Without RUN: all queued runs, and those in ./runs.
    """
    from ibq_scale.cluster import slurm
    from ibq_scale.cluster.runs import describe, known_runs
    from ibq_scale.console import aligned, tell

    queue = slurm.my_jobs()
    places = args.runs or known_runs(queue)
    found, faults = [], []
    for place in places:
        # One unreadable run does not hide the others.
        try:
            found.append(describe(place, queue))
        except UserError as e:
            faults.append(str(e))
    for fault in faults:
        tell(f"ibq-scale: {fault}")
    nothing = [] if faults else ["no runs in the queue or in ./runs: name run directories"]
    show(args, found, aligned([COLUMNS, *map(_row, found)]) if found else nothing)
    return UserError.exit_code if faults and args.runs else 0


def _row(run: Run) -> tuple[str, ...]:
    from ibq_scale.console import duration

    return (
        run.path,
        f"{run.state} ({run.why})" if run.why else run.state,
        "" if run.step is None else f"{run.step}/{run.steps}",
        "" if run.images_per_s is None else f"{run.images_per_s:.4g} img/s",
        "" if run.eta_s is None else duration(run.eta_s),
        "" if run.checkpoint is None else str(run.checkpoint),
        " ".join(run.jobs),
        run.nodes,
    )


@COMMAND.command(
    "save a run and stop it",
    "runs/tok --wait",
    argument("run_dir", type=Path, metavar="RUN"),
    flag("--wait", "return when it has gone"),
)
def _cancel(args: argparse.Namespace) -> int:
    """Take a run's queued jobs out of the queue, and ask the running ones to save, end and not come back. Without
    Slurm, the process on this host is asked.
    """
    from ibq_scale.cluster.cancel import cancel, patience, wait

    if not args.run_dir.is_dir():
        raise UserError(f"{args.run_dir} does not exist: give a run directory")
    asked = cancel(args.run_dir)
    if asked.dropped:
        print(f"taken out of the queue: {', '.join(asked.dropped)}")
    who = f"job {', '.join(asked.saving)}" if asked.saving else str(asked.process or "")
    seconds = patience(args.run_dir)
    if who:
        print(f"{who}: saves and leaves, within {seconds:.0f} s")
    if args.wait and not wait(asked, seconds):
        ends = f"scancel {' '.join(asked.saving)}" if asked.saving else "kill it"
        print(f"ibq-scale: {who} still runs: '{ends}' ends it without a save", file=sys.stderr)
        return 1
    if args.wait:
        print(f"{args.run_dir}: the run has ended (ibq-scale jobs {args.run_dir})")
    return 0
