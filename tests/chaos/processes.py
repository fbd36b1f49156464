"""One life of a run: its processes, found wherever they have gone, and killed."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import psutil

MARK = "IBQ_SCALE_CHAOS_LIFE"
FORK_SERVER = "multiprocessing.forkserver"


class Life:
    """A started command. Everything it starts inherits a mark in its environment, so that nothing escapes the count."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.mark = secrets.token_hex(8)
        self.log = log
        self.began_ns = time.time_ns()
        self._began = time.monotonic()
        environ = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as f:
            self.launcher = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=environ)

    @property
    def ended(self) -> bool:
        return self.launcher.poll() is not None

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self._began

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """The running ones, in rank order."""
        try:
            return sorted(psutil.Process(self.launcher.pid).children(), key=lambda p: p.pid)
        except psutil.NoSuchProcess:
            return []

    def data_workers(self) -> list[psutil.Process]:
        """Children of the ranks' fork servers."""
        return [w for rank in self.ranks() for server in _fork_servers(rank) for w in _children(server)]

    def kill(self, kind: str, random: Random) -> str:
        """SIGKILL to one rank, one data worker, all ranks at once, or the launcher. Where there is none of that kind
        at this moment, to one rank, or else to the launcher. Returns who it was.
        """
        ranks = self.ranks()
        if kind == "data worker" and (workers := self.data_workers()):
            _kill([random.choice(workers)])
            return kind
        if kind == "all ranks" and ranks:
            _kill(ranks)
            return kind
        if kind == "rank 0" and ranks:
            _kill(ranks[:1])
            return kind
        if kind != "launcher" and ranks:
            number = random.randrange(len(ranks))
            _kill([ranks[number]])
            return f"rank {number}"
        self.launcher.kill()
        return "launcher"

    def left(self) -> list[int]:
        """Processes of this life that still run, wherever they hang in the tree."""
        word = f"{MARK}={self.mark}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if word in (path / "environ").read_bytes() and psutil.Process(int(path.name)).status() != "zombie":
                    found.append(int(path.name))
            except (OSError, psutil.Error):
                continue
        return found

    def clear(self) -> None:
        """Ends whatever is left of it."""
        for pid in self.left():
            _kill([psutil.Process(pid)] if psutil.pid_exists(pid) else [])
        self.launcher.wait()


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children())
    except psutil.NoSuchProcess:
        return []


def _fork_servers(rank: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in _children(rank):
        try:
            if FORK_SERVER in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found
