"""The state of runs, from Slurm's queue and from the run directory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ibq_scale.checkpoint.reading import OtherFormatError, whole_checkpoints
from ibq_scale.cluster import snapshot
from ibq_scale.cluster.slurm import Job
from ibq_scale.config.layers import load_resolved
from ibq_scale.config.run import AnyRun
from ibq_scale.documents import json_object
from ibq_scale.errors import UserError
from ibq_scale.supervise.attempts import read_attempts
from ibq_scale.supervise.preemption import REQUEUE_EXIT_CODE
from ibq_scale.supervise.run_lock import BEAT_SECONDS, read_lock

State = Literal["queued", "requeued", "running", "stopped", "finished", "failed"]
# A lock from another host counts as live below this many heartbeats of age.
LIVELY_BEATS = 4.5
# The default folder of `jobs`.
HOME = Path("runs")


@dataclass(frozen=True)
class Run:
    """One run, a row of a table. `why`: the reason for a state, if not obvious. `step`: of the heartbeat while running,
    else of the newest checkpoint. `eta_s`: seconds to the last step at the recent rate.
    """

    path: str
    state: State
    why: str
    step: int | None
    steps: int | None
    images_per_s: float | None
    eta_s: float | None
    checkpoint: int | None
    jobs: tuple[str, ...]
    nodes: str


def known_runs(jobs: Iterable[Job]) -> list[Path]:
    """Run directories of the jobs in the queue, then those under ./runs."""
    queued = [Path(job.run) for job in jobs if job.run is not None]
    here = sorted(path.parent.absolute() for path in HOME.glob("*/config.yaml"))
    return list(dict.fromkeys([*queued, *here]))


def jobs_of(run_dir: Path, jobs: Sequence[Job]) -> list[Job]:
    """The queue's jobs for this run directory, by submission record and by lock holder. Running jobs come first."""
    ids = set(snapshot.submitted_jobs(run_dir))
    held = read_lock(run_dir)
    if held is not None and held.holder is not None and held.holder.job is not None:
        ids.add(held.holder.job)
    place = run_dir.resolve()
    mine = [job for job in jobs if job.id in ids or (job.run is not None and Path(job.run).resolve() == place)]
    return sorted(mine, key=lambda job: (job.pending, len(job.id), job.id))


def describe(run_dir: Path, jobs: Sequence[Job]) -> Run:
    """The run in this directory, with the current queue. UserError without a run."""
    mine = jobs_of(run_dir, jobs)
    config = config_of(run_dir)
    if config is None and not mine:
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml, and no job of it is queued")
    newest = _newest_step(run_dir)
    steps = config.train.total_steps if config is not None else None
    state, why = _state(run_dir, mine, finished=newest is not None and newest == steps)
    beat = json_object(run_dir / "heartbeat.json") if state == "running" else {}
    step, seconds = beat.get("step", newest), beat.get("step_s")
    if not isinstance(step, int) or not isinstance(seconds, (int, float)):
        # The file is no heartbeat of this program.
        step, seconds = newest, None
    rate = config.train.global_batch / seconds if config is not None and seconds else None
    left = (steps - step) * seconds if steps is not None and step is not None and seconds else None
    running = [job for job in mine if not job.pending]
    nodes = running[0].nodes if running else str(beat.get("host", ""))
    return Run(str(run_dir), state, why, step, steps, rate, left, newest, tuple(job.id for job in mine), nodes)


def _state(run_dir: Path, mine: Sequence[Job], *, finished: bool) -> tuple[State, str]:
    attempts = read_attempts(run_dir)
    running = [job for job in mine if not job.pending]
    if running:
        return "running", _phase(run_dir) if running[0].state == "RUNNING" else running[0].state.lower()
    if mine:
        again = any(str(attempt.get("job")) == mine[0].id for attempt in attempts)
        return "requeued" if again else "queued", mine[0].reason
    held = read_lock(run_dir)
    if held is not None:
        alive = held.holder.is_alive() if held.holder is not None else None
        age = time.time() - held.touched
        if alive or (alive is None and age < LIVELY_BEATS * BEAT_SECONDS):
            return "running", _phase(run_dir)
    if finished:
        return "finished", ""
    code = attempts[-1].get("code") if attempts else None
    if code is not None and code not in (0, REQUEUE_EXIT_CODE):
        return "failed", f"code {code}"
    if held is not None:
        return "failed", f"its process is gone ({held.holder or 'unnamed'})"
    return "stopped", ""


def _newest_step(run_dir: Path) -> int | None:
    try:
        whole = whole_checkpoints(run_dir / "checkpoints")
    except OtherFormatError:
        return None
    return whole[-1].step if whole else None


def _phase(run_dir: Path) -> str:
    """The phase, empty while stepping. For some seconds it may be that of an earlier attempt."""
    phase = str(json_object(run_dir / "heartbeat.json").get("phase", "starting"))
    return "" if phase == "step" else phase


def config_of(run_dir: Path) -> AnyRun | None:
    """The config of the run, or of its newest submission before a start. None for an unreadable one, as of another
    release.
    """
    submitted = sorted((run_dir / snapshot.FOLDER).glob(f"*/{snapshot.CONFIG}"))
    for path in [run_dir / "config.yaml", *reversed(submitted)]:
        try:
            return load_resolved(path)
        except UserError:
            continue
    return None
