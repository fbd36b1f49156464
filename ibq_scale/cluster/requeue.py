"""Decides whether an ended job returns to the queue, and without which nodes. The batch script asks after srun's end.

A job returns while its attempts (RUN/attempts.jsonl) make progress. It stays away after several attempts without a new
checkpoint, when it is done or misused, and after an early failure. Its chained jobs are then dropped too, since they
would fail alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibq_scale.cluster.snapshot import chained_after
from ibq_scale.distributed.failed_nodes import Faults, NodeFaultError, recorded
from ibq_scale.distributed.failed_nodes import attempt as this_attempt
from ibq_scale.errors import PortTakenError, StoreUnavailableError, UserError
from ibq_scale.supervise import attempts
from ibq_scale.supervise.attempts import Attempt

# Early failures repeat: a wrong config, a missing file.
EARLY_SECONDS = 600.0
REASONS = {
    StoreUnavailableError.exit_code: "the object storage did not answer",
    70: "it hung, and ended itself",
    71: "a node failed its check",
    75: "it was stopped by a signal",
    PortTakenError.exit_code: "the port where its ranks meet was taken",
}
"""Exit codes without a fault of the run."""


@dataclass(frozen=True)
class End:
    """The answer to the batch script. `dropped`: chained jobs to remove."""

    attempt: Attempt
    dropped: tuple[str, ...] = ()


def after(run_dir: Path, code: int, seconds: float, budget: int, *, may_requeue: bool = True) -> End:
    """Judges the attempt with srun's exit code `code` after `seconds`, and records it in the run's attempts.

    `budget`: allowed attempts in a row without a new step in a checkpoint. `may_requeue`: False for a cancelled job, or
    one without requeue. Its chain goes on. UserError for an unwritable `run_dir`: an uncounted job does not return.
    """
    job, restart = this_attempt()
    earlier = attempts.read_attempts(run_dir)
    before = int(earlier[-1]["step_after"]) if earlier else 0
    step = attempts.newest_step(run_dir)
    faults = recorded(run_dir)
    if faults is not None and code not in (0, 2):
        # For missing ranks srun reports its own kill, a higher code.
        code = NodeFaultError.exit_code
    again, why = _judge(code, seconds, step - before, _idle(job, earlier, step - before), budget)
    dropped = () if again else chained_after(run_dir, job)
    if again and not may_requeue:
        again, why = False, f"{why}; it may not return to the queue"
    excluded = _excluded(faults) if again and faults is not None else ()
    if faults is not None and faults.nodes and code == NodeFaultError.exit_code:
        why += ": " + "; ".join(f"{node} ({fault})" for node, fault in sorted(faults.nodes.items()))
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    found = Attempt(job, int(restart), code, before, step, nodes, seconds, excluded, again, why, attempts.now())
    try:
        attempts.add(run_dir, found)
    except OSError as e:
        raise UserError(f"{run_dir / attempts.ATTEMPTS}: {e.strerror}: the job does not come back") from None
    return End(found, dropped)


def _idle(job: str, earlier: Sequence[dict[str, Any]], new_steps: int) -> int:
    """Attempts of the job in a row without a new step, this one included. Requeues by Slurm itself do not count."""
    idle = 1 if new_steps <= 0 else 0
    for line in reversed(earlier):
        if not idle or line["job"] != job or line["step_after"] > line["step_before"]:
            break
        idle += line["code"] is not None
    return idle


def _excluded(faults: Faults) -> tuple[str, ...]:
    """The nodes to leave out. None if most nodes failed, since the cause is then elsewhere."""
    return tuple(sorted(faults.nodes)) if 2 * len(faults.nodes) <= max(2, faults.of) else ()


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
