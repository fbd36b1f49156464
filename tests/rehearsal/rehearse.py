"""A step of a preset and what runs between steps, on the first of many pretended GPUs, with a real run's engines."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ibq_scale.config.run import AnyRun
from tests.rehearsal import gpu
from tests.rehearsal.parts import PARTS, code_batches, image_batches
from tests.rehearsal.watch import Call, Memory, Watch

PATIENCE = timedelta(minutes=7)
STEP = "step"


class Record(NamedTuple):
    """What a watched part did; `peak`: bytes of GPU memory, `made`: those beyond what was there before."""

    syncs: list[Call]
    collectives: list[Call]
    launches: Counter[str]
    layouts: Counter[tuple[str, str]]
    faults: list[str]
    peak: int
    made: int


Records = dict[str, Record]
"""By part: `STEP`, or one of `PARTS`."""


def rehearse(
    preset: str, words: tuple[str, ...], parts: Iterable[str], ranks: int, before: Callable[[], object] = int
) -> Records:
    """Runs in a process of its own, under `gpu.build_driver`'s environment. `before`: a fault to plant.

    The second step is watched, since the first one also sets things up, and then `parts`.
    """
    gpu.pretend()
    _join(ranks)
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ibq_scale.distributed.world import World
    from ibq_scale.scaling.allocations import as_on_cuda
    from ibq_scale.supervise.preemption import StopRequest
    from ibq_scale.train.run import _make_task

    run = settled(preset, words, ranks)
    world = World(0, ranks, 0, torch.device("cuda", 0))
    _build_on_gpu(run)
    before()
    stop = StopRequest(run.train.grace)
    groups = _Timeouts()
    # Else torch.tensor(…, device="cuda") asks the driver, since CUDA is said to be there.
    FakeTensorMode.avoid_device_init = True  # type: ignore[assignment, method-assign]
    memory, records = Memory(), {}
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_cuda(), memory:
        task: Any = _make_task(run, world, SimpleNamespace(), PATIENCE)  # type: ignore[arg-type]
        batches = code_batches(run) if run.task == "ar" else image_batches(run, run.model.resolution)

        def step() -> None:
            gpu.step += 1
            task.set_rates(0)
            assert task.train_step(batches).applied, "skipped"
            assert not stop.agreed_before(world)

        for part in (STEP, STEP, *parts):
            act = step if part == STEP else PARTS[part](task, run, world)
            memory.peak = there = memory.alive
            watch = Watch()
            with watch.watching():
                act()
            faults = watch.faults + groups.faults()
            made = memory.peak - there
            records[part] = Record(
                watch.syncs, watch.collectives, watch.launches, watch.layouts, faults, memory.peak, made
            )
    return records


def settled(preset: str, words: tuple[str, ...], ranks: int) -> AnyRun:
    """Constants for what is auto: the table does not follow the memory model."""
    from ibq_scale.config.layers import resolve
    from ibq_scale.scaling.auto import settle
    from ibq_scale.scaling.plan import Machine

    run, _ = settle(resolve(preset, ["data.train=none", *words]).config, Machine(gpus=ranks))
    return run


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
