"""One training step of a preset on the first of many pretended GPUs, with a real run's engines and codebook."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests.rehearsal import gpu
from tests.rehearsal.watch import Call, Watch

PATIENCE = timedelta(minutes=7)


class Record(NamedTuple):
    """What the watched step did; `seconds` of CPU time, to build the task and for each step."""

    syncs: list[Call]
    collectives: list[Call]
    launches: Counter[str]
    layouts: Counter[tuple[str, str]]
    faults: list[str]
    seconds: list[float]


def rehearse(preset: str, words: tuple[str, ...], ranks: int, before: Callable[[], object] = int) -> Record:
    """Runs in a process of its own, under `gpu.build_driver`'s environment. `before`: a fault to plant.

    The second step is watched: the first one also sets things up.
    """
    seconds = [time.process_time()]
    gpu.pretend()
    _join(ranks)
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ibq_scale.config.layers import resolve
    from ibq_scale.distributed.world import World
    from ibq_scale.scaling.auto import settle
    from ibq_scale.scaling.plan import Machine
    from ibq_scale.supervise.preemption import StopRequest
    from ibq_scale.train.run import _make_task

    # Constants for what is auto: the table does not follow the memory model.
    run, _ = settle(resolve(preset, ["data.train=none", *words]).config, Machine(gpus=ranks))
    world = World(0, ranks, 0, torch.device("cuda", 0))
    _build_on_gpu(run)
    before()
    stop = StopRequest(run.train.grace)
    watch = Watch()
    groups = _Timeouts()
    # Else torch.tensor(…, device="cuda") asks the driver, since CUDA is said to be there.
    FakeTensorMode.avoid_device_init = True  # type: ignore[assignment, method-assign]
    with FakeTensorMode(allow_non_fake_inputs=True):
        task = _make_task(run, world, SimpleNamespace(), PATIENCE)
        batches = _batches(run)
        seconds.append(time.process_time())
        for watched in (False, True):
            begun = watch if watched else Watch()
            gpu.step += 1
            with begun.watching():
                task.set_rates(0)
                assert task.train_step(batches).applied, "skipped"
                assert not stop.agreed_before(world)
            seconds.append(time.process_time())
    took = [b - a for a, b in pairwise(seconds)]
    faults = watch.faults + groups.faults()
    return Record(watch.syncs, watch.collectives, watch.launches, watch.layouts, faults, took)


class _Timeouts:
    """Which groups got the run's timeout: a fake group has none of its own."""

    def __init__(self) -> None:
        self.set: set[Any] = set()
        vars(dist)["set_timeout"] = lambda timeout, group: self.set.add(group) if timeout == PATIENCE else None

    def faults(self) -> list[str]:
        groups = dist.distributed_c10d._world.pg_map
        return [f"a group of {group.size()} ranks without a timeout" for group in groups if group not in self.set]


def _join(ranks: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def _build_on_gpu(run: Any) -> None:
    """An optimizer must know the parameters that the engine will: they are moved and cast before it is made."""
    from deepspeed.runtime.zero import partitioned_param_coordinator

    from ibq_scale.train import ar_task, tokenizer_task

    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    for name in ("TokenizerModel", "AlignedTokenizer", "DiscriminatorPair"):
        made = vars(tokenizer_task)[name]
        vars(tokenizer_task)[name] = lambda *args, made=made: gpu.place(made(*args), "cuda", dtype)
    vars(ar_task)["check_codes"] = lambda *_: SimpleNamespace(tokenizer=None)
    # It compares values with those of other ranks, until it knows the order of modules.
    vars(partitioned_param_coordinator)["assert_ints_same_as_other_ranks"] = lambda *_: None


def _batches(run: Any) -> Iterator[Any]:
    from ibq_scale.data.stream import CodeBatch, ImageBatch

    count = run.train.micro_batch
    while True:
        labels, requests = torch.zeros(count, dtype=torch.int64), torch.zeros(count, 5, dtype=torch.int64)
        if run.task == "ar":
            yield CodeBatch(torch.zeros(count, run.model.tokens, dtype=torch.int64), labels, requests)
        else:
            side = run.model.resolution
            yield ImageBatch(torch.empty(count, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2), labels, requests)
