"""Whether a job that ended should come back, and to which nodes not: asked by the batch script when srun has ended.

RUN/attempts.jsonl holds a line for each attempt. A job comes back as long as its attempts bring the run on. One that
has not saved a new step for some attempts stays away, as does one that is done, is used wrongly, or fails at once.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ibq_scale.checkpoint.reading import whole_checkpoints
from ibq_scale.distributed.failed_nodes import attempt as this_attempt
from ibq_scale.distributed.failed_nodes import recorded
from ibq_scale.errors import UserError

ATTEMPTS = "attempts.jsonl"
# A wrong config, a missing file: what fails so early fails again.
EARLY_SECONDS = 600.0
REASONS = {
    70: "it hung, and ended itself",
    71: "a node failed its check",
    75: "it was stopped by a signal",
}
"""Codes after which the run is as good as before."""


@dataclass(frozen=True)
class Attempt:
    """One time that a job ran. Steps are those of checkpoints; `seconds` is how long it ran, `time` its end (UTC).

    `excluded`: nodes that it should not come back to. `again`: whether it should come back at all; `why`, in words.
    """

    job: str
    restart: int
    code: int
    step_before: int
    step_after: int
    nodes: str
    seconds: float
    excluded: tuple[str, ...]
    again: bool
    why: str
    time: str


def after(run_dir: Path, code: int, seconds: float, budget: int) -> Attempt:
    """Judges the attempt that ended with srun's exit code `code` after `seconds`, and adds it to the run's attempts.

    `budget`: attempts in a row without a new step in a checkpoint that a job may have. UserError where `run_dir` cannot
    be written to: a job that cannot be counted may not come back.
    """
    job, restart = this_attempt()
    earlier = read_attempts(run_dir)
    before = int(earlier[-1]["step_after"]) if earlier else 0
    step = _newest_step(run_dir)
    faults, of = recorded(run_dir)
    idle = 1 if step <= before else 0
    for line in reversed(earlier):
        if not idle or line["job"] != job or line["step_after"] > line["step_before"]:
            break
        idle += 1
    again, why = _judge(code, seconds, step - before, idle, budget)
    # Where most nodes fail, it is not for the nodes.
    excluded = sorted(faults) if again and code == 71 and 2 * len(faults) <= max(2, of) else []
    if faults and code == 71:
        why += ": " + "; ".join(f"{node} ({fault})" for node, fault in sorted(faults.items()))
    found = Attempt(
        job,
        int(restart),
        code,
        before,
        step,
        os.environ.get("SLURM_JOB_NODELIST", ""),
        seconds,
        tuple(excluded),
        again,
        why,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        with (run_dir / ATTEMPTS).open("a") as f:
            f.write(json.dumps(asdict(found)) + "\n")
    except OSError as e:
        raise UserError(f"{run_dir / ATTEMPTS}: {e.strerror}: the job does not come back") from None
    return found


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """All attempts of a run, oldest first; a line that is cut short, by a full disk say, is left out."""
    path = run_dir / ATTEMPTS
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _judge(code: int, seconds: float, new_steps: int, idle: int, budget: int) -> tuple[bool, str]:
    if code == 0:
        return False, "it is done"
    if code == 2:
        return False, "it cannot go on as it is: the lines above say what to change"
    why = REASONS.get(code, f"it failed with code {code}")
    if code not in REASONS and new_steps <= 0 and seconds < EARLY_SECONDS:
        return False, f"{why} after {seconds:.0f} s, before it saved a new step: that would happen again"
    if idle >= budget:
        return False, f"{why}, and {idle} attempts in a row saved no new step"
    progress = f"{new_steps} new steps are saved" if new_steps > 0 else f"attempt {idle} of {budget} without a new step"
    return True, f"{why}; {progress}"


def _newest_step(run_dir: Path) -> int:
    try:
        whole = whole_checkpoints(run_dir / "checkpoints")
    except UserError:
        return 0
    return whole[-1].step if whole else 0
