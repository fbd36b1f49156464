"""Runs jobs in processes: results in the jobs' order, a few jobs ahead, and one line of progress."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import forkserver, get_context
from typing import Any, TypeVar

from ibq_scale.data.progress import Progress
from ibq_scale.errors import UserError

J = TypeVar("J")
R = TypeVar("R")
POLL_SECONDS = 0.2
Report = Callable[[int, int, int], None]
"""Called by a job with its progress since the last call: images, bytes read, bytes found done."""

# Memory shared with the parent. A queue could fill up after the parent's last read, and block.
_totals: Any = None


def run_jobs(work: Callable[[J, Report], R], jobs: Iterable[J], *, workers: int, progress: Progress) -> Iterator[R]:
    """Calls ``work(job, report)`` for every job, in this process for one worker. `work` is a module's own function.

    Raises the first error of a job, and UserError if a process was killed.
    """
    if workers == 1:
        totals = [0, 0, 0]

        def report(*done: int) -> None:
            totals[:] = (a + b for a, b in zip(totals, done, strict=True))
            progress.show(*totals)

        for job in jobs:
            yield work(job, report)
        progress.close()
        return
    # The server imports the module once for all workers.
    forkserver.set_forkserver_preload([work.__module__])
    context = get_context("forkserver")
    shared = context.Array("q", 3)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(shared,)) as pool:
        try:
            coming = iter(jobs)
            waiting: deque[Future[R]] = deque(pool.submit(_call, work, job) for job in islice(coming, 2 * workers))
            while waiting:
                while not wait([waiting[0]], POLL_SECONDS).done:
                    progress.show(*shared[:])
                result = waiting.popleft().result()
                waiting.extend(pool.submit(_call, work, job) for job in islice(coming, 1))
                progress.show(*shared[:])
                yield result
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, for want of memory perhaps: run it again with fewer --workers; "
                "it goes on where it was"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
            progress.close()


def _start(totals: Any) -> None:
    """Ignores Ctrl-C in a worker: it reaches the whole process group, and the parent handles it."""
    global _totals
    _totals = totals
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call(work: Callable[[J, Report], R], job: J) -> R:
    return work(job, _report)


def _report(*done: int) -> None:
    with _totals.get_lock():
        for i, value in enumerate(done):
            _totals[i] += value
