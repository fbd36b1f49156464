"""Slurm's commands."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from ibq_scale.errors import UserError

# For a busy controller. A dead one never answers.
PATIENCE_SECONDS = 120.0
# For queries of the cluster's state.
LOOK_SECONDS = 10.0
# squeue: id, state, number and names of nodes, reason, work directory, comment.
COLUMNS = "%i|%T|%D|%N|%r|%k"
# Written by sbatch into the job's comment, returned by squeue.
COMMENT = "ibq-scale "

# For installed commands without a cluster.
NO_CLUSTER = "establish a configuration source"


class NoSlurmError(UserError):
    """Slurm is not available."""


@dataclass(frozen=True)
class Job:
    """A job in the queue. `state`: Slurm's word. `run`: the run directory, from the comment by `submit`."""

    id: str
    state: str
    node_count: int
    nodes: str
    reason: str
    run: str | None

    @property
    def pending(self) -> bool:
        return self.state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


def my_jobs() -> list[Job]:
    """The user's queued or running jobs. Empty without Slurm. UserError without an answer."""
    try:
        listed = _run("squeue", "--me", "--noheader", "--array", f"--format={COLUMNS}")
    except NoSlurmError:
        return []
    return [_job(line) for line in listed.splitlines()]


def submit(script: str, words: Sequence[str], after: str | None) -> str:
    """Queues a script with its arguments after the end of job `after`. Returns the job id. UserError if refused."""
    dependency = [f"--dependency=afterany:{after}"] if after is not None else []
    # With several clusters, the cluster's name follows the id.
    return _run("sbatch", "--parsable", *dependency, script, *words).strip().partition(";")[0]


def rehearse(script: str) -> str:
    """Slurm's expected start of a script, without queueing it. UserError if Slurm would refuse it."""
    said = _run("sbatch", "--test-only", text=script, both=True)
    # The job number in it is not real.
    return re.sub(r"(?s).*Job \d+ to start at", "would start at", " ".join(said.split()))


def drop(ids: Sequence[str]) -> None:
    """Removes jobs from the queue, and kills running ones."""
    if ids:
        _run("scancel", *ids)


def ask_to_save(job: str) -> None:
    """Sends SIGUSR1 to the job's ranks, not to its batch script. The job does not return to the queue."""
    _run("scontrol", "update", f"JobId={job}", "Requeue=0")
    _run("scancel", "--signal=USR1", job)


def version() -> str:
    """Slurm's version, as ``slurm 22.05.8``. UserError as `my_jobs`, NoSlurmError without Slurm."""
    return _run("sbatch", "--version", seconds=LOOK_SECONDS).strip()


def controllers() -> list[str]:
    """Hosts of controllers with an answer. UserError if none answers, NoSlurmError without a cluster."""
    said = _run("scontrol", "ping", seconds=LOOK_SECONDS)
    up = re.findall(r"Slurmctld\(\w+\) at (\S+) is UP", said)
    if not up:
        raise UserError(f"no controller answers: {(said.strip() or 'no word').splitlines()[-1].strip()}")
    return up


def partitions() -> list[dict[str, str]]:
    """The visible partitions in Slurm's words: PartitionName, State, MaxTime, DefaultTime… UserError as above."""
    said = _run("scontrol", "show", "partition", "--oneliner", seconds=LOOK_SECONDS)
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in said.splitlines() if "PartitionName=" in line]


def settings() -> dict[str, str]:
    """The controller's slurm.conf: JobRequeue, KillWait… UserError as above."""
    said = _run("scontrol", "show", "config", seconds=LOOK_SECONDS)
    return dict(re.findall(r"^(\w+)\s*= (.*\S)", said, re.MULTILINE))


def _job(line: str) -> Job:
    job, state, count, nodes, reason, comment = line.split("|", 5)
    run = comment.removeprefix(COMMENT).strip() if comment.startswith(COMMENT) else None
    return Job(job, state, int(count), nodes, reason, run)


def _run(*command: str, text: str | None = None, both: bool = False, seconds: float = PATIENCE_SECONDS) -> str:
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, timeout=seconds, check=False, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError:
        raise NoSlurmError(f"there is no {command[0]} here: run this where Slurm is (a login node)") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} does not answer in {seconds:.0f} s: is Slurm up? (sinfo)") from None
    if done.returncode and NO_CLUSTER in done.stderr + done.stdout:
        raise NoSlurmError(f"{command[0]} finds no cluster: run this where Slurm is (a login node), or set SLURM_CONF")
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise UserError(f"{command[0]}: {said.removeprefix(f'{command[0]}: ').removeprefix('error: ')}")
    return done.stdout + (done.stderr if both else "")
