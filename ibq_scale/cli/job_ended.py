"""``ibq-scale job-ended`` and ``step-ended``, for batch scripts and absent from the list of commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from ibq_scale.cli.options import Family, argument, finite, flag

CODE = argument("--code", type=int, required=True, metavar="N", help="srun's exit code")
COMMAND = Family()
add_commands = COMMAND.add_commands


def _first_code(args: argparse.Namespace) -> int:
    """srun reports the highest code of its ranks, and this may be that of a rank killed by srun."""
    from ibq_scale.distributed.failures import tell_of_job_step

    return tell_of_job_step() or int(args.code)


@COMMAND.command(None, "--code 143", CODE)
def _step_ended(args: argparse.Namespace) -> int:
    """Prints the exit code of the first cause, for a job without training. The ranks' failures go to standard error."""
    print(_first_code(args))
    return 0


@COMMAND.command(
    None,
    "runs/tok --code 75 --seconds 3600",
    argument("folder", metavar="RUN", type=Path, help="run directory"),
    CODE,
    argument("--seconds", type=finite, required=True, metavar="S", help="how long the job ran"),
    argument("--attempts", type=int, default=3, metavar="N", help="in a row without a new step (default 3)"),
    flag("--stays", "it was cancelled, or may not go back into the queue"),
)
def _job_ended(args: argparse.Namespace) -> int:
    """Prints 'requeue', the exit code and the nodes to leave out, or 'end', the exit code and the jobs of its chain to
    drop. The reason and the ranks' failures go to standard error.
    """
    from ibq_scale.cluster.requeue import after
    from ibq_scale.console import tell

    end = after(args.folder, _first_code(args), args.seconds, args.attempts, may_requeue=not args.stays)
    attempt = end.attempt
    without = f", without {', '.join(attempt.excluded)}" if attempt.excluded else ""
    tell(f"ibq-scale: the job {f'goes back into the queue{without}' if attempt.again else 'ends'}: {attempt.why}")
    if end.dropped:
        tell(f"ibq-scale: its chained jobs are taken out of the queue: {', '.join(end.dropped)}")
    print("requeue" if attempt.again else "end", attempt.code, ",".join(attempt.excluded or end.dropped))
    return 0
