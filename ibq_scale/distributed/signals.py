"""The signals that ask a run to save and exit. They are blocked until a handler is ready."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

# Slurm's preemption and cancellation, Slurm's notice before the time limit, Ctrl-C.
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def blocked() -> Iterator[None]:
    """Keeps these signals pending, here and in processes started meanwhile, until `unblock`.

    A signal still pending at the end is dropped, since it came too late to change anything.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        while signal.sigtimedwait(ASKING, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock() -> None:
    """Delivers the pending signals."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)


def ignore() -> None:
    """Ignores these signals, for an ending process with a known exit code."""
    for signum in ASKING:
        signal.signal(signum, signal.SIG_IGN)
