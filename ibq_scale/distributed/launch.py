"""Starts one process a rank on this node and waits for them, when no other launcher did.

Not torchrun: its agent turns every child's exit code into 1, ends children 30 seconds after a signal whatever they
are saving, and drops SIGUSR1. Here signals reach every rank, codes come back as they are, and importing stays light.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType

from ibq_scale.distributed.environment import free_port
from ibq_scale.distributed.signals import held, let_in
from ibq_scale.errors import UserError

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
# Ranks that outlive a failed one wait for it inside a collective: they get this long to end by themselves.
GRACE_SECONDS = 20.0


def default_ranks() -> int:
    """One rank a visible GPU, else one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([d for d in visible.split(",") if d.strip()]))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 1
    return max(1, listed.stdout.count("GPU "))


def launch(words: Sequence[str], ranks: int | None) -> int:
    """Runs ``ibq-scale WORDS`` on `ranks` processes of this node.

    Returns 0 when all ranks did, else the first failing rank's exit code (128 + n for a signal n). The first
    failure ends the others. SIGTERM and SIGUSR1 are passed on to every rank; Ctrl-C reaches them from the terminal.
    """
    count = default_ranks() if ranks is None else ranks
    if count < 1:
        raise UserError(f"--ranks {count}: at least one rank is needed")
    children: list[subprocess.Popen[bytes]] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signum)

    # Ranks start with signals held back too, until they can answer them.
    with held():
        before = {s: signal.signal(s, forward) for s in FORWARDED}
        # Not ignored: ranks would inherit that.
        before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            children += _start(words, count)
            if signal.SIGINT in signal.sigpending():
                # The terminal sent it before there were ranks.
                forward(signal.SIGINT, None)
            let_in()
            return _wait(children)
        finally:
            _end(children, 0.0)
            signal.pthread_sigmask(signal.SIG_BLOCK, before)
            for s, handler in before.items():
                signal.signal(s, handler)


def _start(words: Sequence[str], count: int) -> list[subprocess.Popen[bytes]]:
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    # Several ranks with a thread a core each slow one another down; a user's own setting wins.
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, "-m", "ibq_scale", *words]
    return [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
            preexec_fn=partial(_die_with_parent, os.getpid()),
        )
        for r in range(count)
    ]


def _die_with_parent(parent: int) -> None:
    """A rank whose launcher was killed must not train on beside its successor."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    # No signal tells of a launcher that was killed before this.
    if os.getppid() != parent:
        os._exit(1)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [child.poll() for child in children]
        failed = [c for c in codes if c]
        if failed:
            _end(children, GRACE_SECONDS)
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(c == 0 for c in codes):
            return 0
        time.sleep(0.05)


def _end(children: list[subprocess.Popen[bytes]], grace: float) -> None:
    deadline = time.monotonic() + grace
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
