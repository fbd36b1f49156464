"""Cancels a run without loss: the run saves, ends, and does not return to the queue."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from ibq_scale.cluster import slurm
from ibq_scale.cluster.runs import config_of, jobs_of
from ibq_scale.errors import UserError
from ibq_scale.supervise.run_lock import Holder, read_lock

POLL_SECONDS = 2.0
UNKNOWN_GRACE_SECONDS = 270.0
# For signals, epilogs and slow answers of Slurm.
SLURM_SECONDS = 60.0


@dataclass(frozen=True)
class Asked:
    """The parties asked to leave: jobs removed from the queue, jobs and a process now saving."""

    dropped: tuple[str, ...]
    saving: tuple[str, ...]
    process: Holder | None = None


def cancel(run_dir: Path) -> Asked:
    """Removes the run's queued jobs and asks the running ones to save and leave.

    Without Slurm, the process on this host is asked. UserError without a running process, or with one on another host.
    """
    mine = jobs_of(run_dir, slurm.my_jobs())
    queued = [job.id for job in mine if job.pending]
    running = [job.id for job in mine if not job.pending]
    # Queued jobs first: they wait for the running one's end.
    slurm.drop(queued)
    for job in running:
        slurm.ask_to_save(job)
    if mine:
        return Asked(tuple(queued), tuple(running))
    return Asked((), (), _ask_process(run_dir))


def patience(run_dir: Path) -> float:
    """Seconds until an asked run has ended: its grace time plus Slurm's delay."""
    config = config_of(run_dir)
    return (config.train.grace if config is not None else UNKNOWN_GRACE_SECONDS) + SLURM_SECONDS


def wait(asked: Asked, seconds: float) -> bool:
    """Whether all jobs and processes ended within the given seconds."""
    deadline = time.monotonic() + seconds
    process = asked.process
    while process.is_alive() if process is not None else any(job.id in asked.saving for job in slurm.my_jobs()):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _ask_process(run_dir: Path) -> Holder:
    """Signals rank 0. One informed rank is enough, since all ranks agree on a stop after each step."""
    held = read_lock(run_dir)
    holder = held.holder if held is not None else None
    alive = holder is not None and holder.is_alive()
    if holder is None or alive is False:
        raise UserError(f"no run is active in {run_dir}: there is nothing to cancel (ibq-scale jobs {run_dir})")
    if not alive:
        raise UserError(f"{run_dir} is trained by {holder}: run this there, or where its Slurm is")
    os.kill(holder.pid, signal.SIGUSR1)
    return holder
