"""Ports of the loopback interface for servers that are started later."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from itertools import count, islice
from pathlib import Path

# The kernel gives ports from 32768 on to connections, and jobs of the tests' Slurm meet from 10000 on.
FIRST, LAST = 20000, 29999


def free_ports(wanted: int) -> list[int]:
    """Ports where nobody listens, and that no other test is given before all the others have been."""
    with (Path(tempfile.gettempdir()) / f"ibq_scale-tests-ports-{os.getuid()}").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        start = int(file.read() or 0)
        steps = (step for step in count(start) if _is_free(_port(step)))
        found = list(islice(steps, wanted))
        file.truncate(0)
        file.write(str(found[-1] + 1))
    return [_port(step) for step in found]


def free_port() -> int:
    return free_ports(1)[0]


def _port(step: int) -> int:
    return FIRST + step % (LAST + 1 - FIRST)


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
