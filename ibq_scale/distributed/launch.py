"""Starts one process per rank on this node and waits for them, if no other launcher did.

Not torchrun: its agent turns every child's exit code into 1, ends children 30 seconds after a signal even during a
save, and drops SIGUSR1. Here signals reach every rank, exit codes are kept, and the import is light.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from ibq_scale.console import tell
from ibq_scale.distributed.failures import FOLDER, collect, explain
from ibq_scale.distributed.side_channel import LISTENER
from ibq_scale.distributed.signals import blocked, unblock
from ibq_scale.errors import UserError

# SIGINT too, since a supervisor or an IDE sends it to this process alone. From a terminal it reaches a rank twice,
# without harm.
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Time for the other ranks to end by themselves after a failure. They wait for the failed rank in a collective.
GRACE_SECONDS = 20.0


def default_ranks() -> int:
    """One rank per visible GPU, else one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([d for d in visible.split(",") if d.strip()]))
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, timeout=20, check=False, encoding="utf-8", errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return 1
    return max(1, listed.stdout.count("GPU "))


def launch(words: Sequence[str], ranks: int | None) -> int:
    """Runs ``ibq-scale WORDS`` on `ranks` processes of this node.

    Returns 0 if all ranks did, else the exit code of the first failed rank (128 + n for a signal n). The first failure
    ends the other ranks, and one message reports all errors. SIGTERM, SIGUSR1 and SIGINT are passed on to every rank.
    """
    count = default_ranks() if ranks is None else ranks
    if count < 1:
        raise UserError(f"--ranks {count}: at least one rank is needed")
    children: list[subprocess.Popen[bytes]] = []
    failures = Path(tempfile.mkdtemp(prefix="ibq-scale-"))

    def forward(signum: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signum)

    # The ranks inherit the blocked signals, until they have handlers.
    with blocked():
        before = {s: signal.signal(s, forward) for s in FORWARDED}
        try:
            children += _start(words, count, failures)
            unblock()
            return _wait(children, failures)
        finally:
            _end(children, 0.0)
            shutil.rmtree(failures, ignore_errors=True)
            signal.pthread_sigmask(signal.SIG_BLOCK, before)
            for s, handler in before.items():
                signal.signal(s, handler)


def _start(words: Sequence[str], count: int, failures: Path) -> list[subprocess.Popen[bytes]]:
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared[FOLDER] = str(failures)
    # Ranks with a thread per core each slow one another down. The user's setting wins.
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, "-m", "ibq_scale", *words]
    # Rank 0 inherits the listening socket. Another program could take a port that is only reserved by number.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        shared |= {"MASTER_PORT": str(listener.getsockname()[1]), LISTENER: str(listener.fileno())}
        return [
            subprocess.Popen(
                command,
                env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
                pass_fds=() if r else (listener.fileno(),),
                preexec_fn=partial(_die_with_parent, os.getpid()),
            )
            for r in range(count)
        ]


def _die_with_parent(parent: int) -> None:
    """Kills the rank with its launcher. It must not train beside its successor."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    # A launcher killed before the prctl sends no signal.
    if os.getppid() != parent:
        os._exit(1)


def _wait(children: list[subprocess.Popen[bytes]], failures: Path) -> int:
    while True:
        codes = [child.poll() for child in children]
        if any(codes):
            _end(children, GRACE_SECONDS)
            return _explain(codes, failures)
        if all(c == 0 for c in codes):
            return 0
        time.sleep(0.05)


def _explain(codes: Sequence[int | None], failures: Path) -> int:
    """Reports the ranks' errors and returns the first cause's code. `codes`: before this process ended any rank."""
    left = collect(failures)
    killed = {rank: -code for rank, code in enumerate(codes) if code is not None and code < 0}
    if said := explain(left, killed):
        tell(said)
    if left and not left[0].follows:
        return left[0].code
    first = next(iter(killed), None)
    return 128 + killed[first] if first is not None else next(code for code in codes if code)


def _end(children: list[subprocess.Popen[bytes]], grace: float) -> None:
    deadline = time.monotonic() + grace
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
