"""RUN/attempts.jsonl: a line for each time that a job ran. Which of them should come back is `cluster.requeue`'s."""

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
    """One time that a job ran. Steps are those of checkpoints; `seconds` is how long it ran, `time` its end (UTC), or
    when that was noticed.

    `code`: srun's; None where Slurm ended it and started it again by itself, so that nobody could ask. `excluded`:
    nodes that it should not come back to. `again`: whether it should come back at all; `why`, in words.
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
    """Adds the line. OSError where that cannot be."""
    with (run_dir / ATTEMPTS).open("a", encoding="utf-8") as f:
        f.write(json.dumps(asdict(attempt)) + "\n")


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """All attempts of a run, oldest first; a line that is damaged, or cut short by a full disk, is left out."""
    path = run_dir / ATTEMPTS
    lines = read_json_lines(path) if path.is_file() else ()
    return [line for _, line in lines if _is_whole(line)]


def _is_whole(line: dict[str, Any]) -> bool:
    """Whether the line has what is counted, as it was written."""
    steps = [line.get(key) for key in ("restart", "step_before", "step_after")]
    code = line.get("code", "absent")
    return (
        isinstance(line.get("job"), str)
        and all(isinstance(step, int) for step in steps)
        and isinstance(code, int | None)
    )


def add_unnoticed(run_dir: Path) -> None:
    """Adds lines for those attempts of this very job that Slurm ended and started again by itself: a node that failed
    takes along the script that would have told. OSError as for `add`.
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
    """Of the newest whole checkpoint, 0 where there is none that this program reads."""
    try:
        whole = whole_checkpoints(run_dir / "checkpoints")
    except UserError:
        return 0
    return whole[-1].step if whole else 0


def now() -> str:
    """Of the clock of this node, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
