"""RUN/attempts.jsonl: a line for each attempt of a job. `cluster.requeue` decides if a job returns."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ibq_scale.checkpoint.reading import whole_checkpoints
from ibq_scale.distributed.failed_nodes import attempt as this_attempt
from ibq_scale.documents import read_json_lines
from ibq_scale.errors import UserError

ATTEMPTS = "attempts.jsonl"


@dataclass(frozen=True)
class Attempt:
    """One attempt of a job. `step_before`, `step_after`: of checkpoints. `seconds`: its duration. `time`: its end, or
    the time of this line (UTC).

    `code`: srun's exit code. None: Slurm ended the attempt and started the next one by itself. `excluded`: nodes to
    avoid in the next attempt. `again`: whether there is a next attempt. `why`: the reason in words.
    """

    job: str
    restart: int
    code: int | None
    step_before: int
    step_after: int
    nodes: str
    seconds: float | None
    excluded: tuple[str, ...]
    again: bool
    why: str
    time: str


def add(run_dir: Path, attempt: Attempt) -> None:
    """Appends the line. OSError if it cannot be written."""
    with (run_dir / ATTEMPTS).open("a", encoding="utf-8") as f:
        f.write(json.dumps(asdict(attempt)) + "\n")


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """All attempts of a run, oldest first. Damaged lines, for example after a full disk, are left out."""
    path = run_dir / ATTEMPTS
    lines = read_json_lines(path) if path.is_file() else ()
    return [line for _, line in lines if _is_whole(line)]


def _is_whole(line: dict[str, Any]) -> bool:
    """Whether all counted keys are there with their types."""
    steps = [line.get(key) for key in ("restart", "step_before", "step_after")]
    code = line.get("code", "absent")
    return (
        isinstance(line.get("job"), str)
        and all(isinstance(step, int) for step in steps)
        and isinstance(code, int | None)
    )


def add_unnoticed(run_dir: Path) -> None:
    """Adds the missing attempts of this job. A failed node takes along the batch script, and Slurm starts the job again
    by itself. OSError as for `add`.
    """
    job, restart = this_attempt()
    earlier = read_attempts(run_dir)
    told = {int(line["restart"]) for line in earlier if line["job"] == job}
    for lost in sorted({*range(int(restart))} - told):
        before = int(earlier[-1]["step_after"]) if earlier else 0
        why = "Slurm ended it and started it again by itself (a node failed, it was preempted, or scontrol requeue)"
        add(run_dir, Attempt(job, lost, None, before, newest_step(run_dir), "", None, (), True, why, now()))
        earlier = read_attempts(run_dir)


def newest_step(run_dir: Path) -> int:
    """The step of the newest whole checkpoint, 0 without a readable one."""
    try:
        whole = whole_checkpoints(run_dir / "checkpoints")
    except UserError:
        return 0
    return whole[-1].step if whole else 0


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
