"""The signals that ask a run to save and leave, held back until there is somebody to hear them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

# Slurm's at preemption and cancellation, Slurm's before the time limit, Ctrl-C.
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def blocked() -> Iterator[None]:
    """Keeps these signals pending, here and in processes that are started meanwhile, until `unblock`.

    One that is pending at the end came too late to change anything, and is dropped.
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
    """What was held back comes now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)


def ignore() -> None:
    """For a process that only has to end: its exit code is known."""
    for signum in ASKING:
        signal.signal(signum, signal.SIG_IGN)
