"""Nodes that failed the check at the start, by the names that a scheduler knows: RUN/failed_nodes.json. No torch."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from ibq_scale.errors import UserError

FILE = "failed_nodes.json"


class NodeFaultError(UserError):
    """A node is broken, and the run is not: on other nodes the same command goes on."""

    # EX_OSERR of sysexits.h.
    exit_code = 71


def node_name() -> str:
    """This node's name for its scheduler, or its host name where there is none."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def record(run_dir: Path, faults: dict[str, str], of: int) -> None:
    """Writes which of a job's nodes (`of`: how many it has) failed, and why, for who starts it again."""
    found = {"attempt": attempt(), "of": of, "faults": faults}
    # The failure itself is being told; that it cannot be written down as well changes nothing.
    with suppress(OSError):
        (run_dir / FILE).write_text(json.dumps(found, indent=1) + "\n")


def recorded(run_dir: Path) -> tuple[dict[str, str], int]:
    """What this attempt of this job has recorded: faults by node, and the number of all its nodes."""
    try:
        found = json.loads((run_dir / FILE).read_text())
        if found["attempt"] == attempt():
            return dict(found["faults"]), int(found["of"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}, 0


def attempt() -> list[str]:
    """Job, and how often Slurm has started it again."""
    return [os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")]
