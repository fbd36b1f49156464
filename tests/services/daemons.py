"""What the services' starters share: ports, and running one by hand until Ctrl-C."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def run_by_hand(missing: Sequence[str], start: Callable[[Path], AbstractContextManager[Mapping[str, str]]]) -> None:
    """Starts a service in a folder of its own, prints the environment that leads there, and stops it at Ctrl-C."""
    if missing:
        raise SystemExit(f"apt-get install --no-install-recommends {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder, start(Path(folder)) as environment:
        print("export", *(f"{name}={value}" for name, value in environment.items()), flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass
