"""Runs a function on several real gloo ranks, each a process of its own."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ibq_scale.distributed.environment import free_port


def _entry(rank: int, world_size: int, port: int, fn: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
        # As bytes: a queue would send tensors by file handles, which end with this process.
        results.put((rank, pickle.dumps(fn(rank, world_size, *args)), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """Calls ``fn(rank, world_size, *args)`` on `world_size` gloo ranks; returns their results in rank order.

    `fn` is a module-level function with a picklable result. Raises AssertionError with the first rank's traceback.
    """
    context = mp.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    workers = [
        context.Process(target=_entry, args=(r, world_size, port, fn, args, queue), daemon=True)
        for r in range(world_size)
    ]
    for w in workers:
        w.start()
    got: dict[int, Any] = {}
    try:
        while len(got) < world_size:
            rank, value, error = queue.get(timeout=timeout)
            assert error is None, f"rank {rank} failed:\n{error}"
            got[rank] = pickle.loads(value)
        for w in workers:
            w.join(timeout=60)
    finally:
        for w in workers:
            if w.is_alive():
                w.terminate()
    return [got[r] for r in range(world_size)]
