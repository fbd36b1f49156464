"""RUN/failed_nodes.json: nodes with a failed start-up check, by their names in the scheduler. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ibq_scale.errors import UserError

FILE = "failed_nodes.json"


class NodeFaultError(UserError):
    """A node is broken, and the run is not. The same command goes on with other nodes."""

    # EX_OSERR of sysexits.h.
    exit_code = 71

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults) + ". Leave that node out (sbatch --exclude) or mend it")


@dataclass(frozen=True)
class Faults:
    """The failed nodes of a job, with the reasons. `of`: the number of the job's nodes."""

    nodes: dict[str, str]
    of: int

    def record(self, run_dir: Path | None) -> None:
        """Writes them to `run_dir` for the restart of the job."""
        if run_dir is None:
            return
        found = {"attempt": attempt()} | asdict(self)
        # The failure is reported anyway, so an error of this write changes nothing.
        with suppress(OSError):
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def recorded(run_dir: Path) -> Faults | None:
    """The faults recorded by this attempt of this job. None if its nodes passed."""
    try:
        found = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
        if found["attempt"] == attempt():
            return Faults(dict(found["nodes"]), int(found["of"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def attempt() -> list[str]:
    """The job's id and its number of restarts by Slurm."""
    return [os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")]


def node_name() -> str:
    """This node's name in its scheduler, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def names_of_nodes() -> list[str]:
    """All nodes of this job step, rank 0's first. Empty without Slurm, or if the list cannot be parsed."""
    return expand(os.environ.get("SLURM_STEP_NODELIST", ""))


def expand(listed: str) -> list[str]:
    """``gpu[01-03,7],login`` → gpu01, gpu02, gpu03, gpu7, login: Slurm's form of lists. ``[]`` for other forms.

    Not `scontrol show hostnames`, since containers lack it.
    """
    names: list[str] = []
    for word in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", listed):
        found = re.fullmatch(r"([^\[\]]*)(?:\[([\d,-]+)\])?([^\[\]]*)", word)
        if found is None:
            return []
        head, numbers, tail = found.groups()
        for span in numbers.split(",") if numbers else [""]:
            first, _, last = span.partition("-")
            width = len(first)
            numbered = [f"{n:0{width}}" for n in range(int(first), int(last or first) + 1)] if span else [""]
            names += [f"{head}{number}{tail}" for number in numbered]
    return names
