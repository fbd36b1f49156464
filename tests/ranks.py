"""Runs a function on several real gloo ranks, each a process of its own."""

from __future__ import annotations

import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.nursery import Forked, Nursery, nursery, rank_environ

_CPU = {"DS_ACCELERATOR": "cpu"}


def _entry(rank: int, world_size: int, fn: Callable[..., Any], args: tuple[Any, ...], result: Path) -> int:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=300))
        result.write_bytes(pickle.dumps((fn(rank, world_size, *args), None)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        result.write_bytes(pickle.dumps((None, traceback.format_exc())))
        return 1
    return 0


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0, of: Nursery | None = None
) -> list[Any]:
    """Calls ``fn(rank, world_size, *args)`` on `world_size` gloo ranks; returns their results in rank order.

    `fn` is a module-level function with a picklable result. `timeout`: of the whole, in seconds. `of`: who forks them,
    where the session's own would not do. Raises AssertionError with the traceback of the first rank that failed.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        results = [Path(folder, str(rank)) for rank in range(world_size)]
        workers = [
            (of or nursery()).start(partial(_entry, rank, world_size, fn, args, results[rank]), environ | _CPU)
            for rank, environ in enumerate(rank_environ(world_size))
        ]
        try:
            _wait(workers, results, timeout)
        finally:
            for worker in workers:
                worker.kill()
                out, err = worker.communicate()
                print(out, end="")
                print(err, end="", file=sys.stderr)
        return [pickle.loads(result.read_bytes())[0] for result in results]


def _wait(workers: list[Forked], results: list[Path], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(worker.returncode != 0 for worker in workers):
        for rank, worker in enumerate(workers):
            if worker.poll():
                error = pickle.loads(results[rank].read_bytes())[1] if results[rank].is_file() else worker.said()
                raise AssertionError(f"rank {rank} failed, exit code {worker.returncode}:\n{error}")
        assert time.monotonic() < deadline, f"ranks run still after {timeout:g} s"
        time.sleep(0.01)
