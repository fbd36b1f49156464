"""Times training steps of either stage: the common part of `bench tokenizer` and `bench ar`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ibq_scale.bench.clock import Clock
from ibq_scale.bench.device import reference, shown
from ibq_scale.config.layers import MISSING
from ibq_scale.config.run import AnyRun
from ibq_scale.distributed.memory import peak_bytes
from ibq_scale.distributed.world import World
from ibq_scale.models.layout import compute_dtype
from ibq_scale.scaling.plan import Machine, make_plan
from ibq_scale.train.task import Task

DATA = "data"
WARM_UP = 2


@dataclass(frozen=True)
class Part:
    """One part of a step on one rank: seconds, its share of the step (0 to 1), and its required FLOPs."""

    name: str
    seconds: float
    share: float
    flops: float | None


@dataclass(frozen=True)
class StepReport:
    """A step of one config. `step_s`: median. Parts: means over the same steps, of rank 0.

    `mfu`: required FLOPs over the data sheet's peak, None for an unknown device. `of_product`: required FLOPs over
    those of the best matrix product in `product` (its FLOP/s and shape), a high share on devices with slow products.
    `executed_per_image`: FLOPs with recomputation, by the plan.
    `peak_bytes`: the allocator's on a GPU, the whole process's on a CPU. `base_bytes`: memory before the first step.
    """

    name: str
    data: str
    device: str
    ranks: int
    threads: int
    precision: str
    global_batch: int
    micro_batch: int
    steps: int
    step_s: float
    images_per_s: float
    flops_per_image: float
    executed_per_image: float
    flops_formula: str
    sheet_flops: float | None
    mfu: float | None
    product_flops: float
    product: str
    of_product: float
    base_bytes: int
    peak_bytes: int
    parts: tuple[Part, ...]


def report_fields(
    run: AnyRun, world: World, measured: Measured, *, flops: float, formula: str, needs: Mapping[str, float | None]
) -> dict[str, Any]:
    """The fields of a `StepReport`. `needs`: the parts in their order, with FLOPs per image of those with products."""
    spent, steps, step_s = measured.spent, len(measured.seconds), statistics.median(measured.seconds)
    images, total = run.train.global_batch // world.size, sum(measured.spent.values())
    ideal = reference(world.device, compute_dtype(run))
    rate = flops * images / step_s
    parts = [
        Part(name, spent[name] / steps, spent[name] / total, None if need is None else need * images)
        for name, need in needs.items()
        if name in spent
    ]
    return {
        "name": run.name,
        "data": "synthetic" if run.data.train == MISSING else ", ".join(run.data.sources),
        "device": shown(world.device),
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "precision": run.train.precision,
        "global_batch": run.train.global_batch,
        "micro_batch": run.train.micro_batch,
        "steps": steps,
        "step_s": step_s,
        "images_per_s": run.train.global_batch / step_s,
        "flops_per_image": flops,
        "executed_per_image": make_plan(run, Machine(world.size), mfu=0.5).flops.executed,
        "flops_formula": formula,
        "sheet_flops": ideal.sheet,
        # Against the data sheet only. A measured peak would hide a slow device.
        "mfu": None if ideal.sheet is None else rate / ideal.sheet,
        "product_flops": ideal.product,
        "product": f"{ideal.side}² in {ideal.dtype}",
        "of_product": rate / ideal.product,
        "base_bytes": measured.base_bytes,
        "peak_bytes": peak_bytes(world.device),
        "parts": tuple(parts),
    }


class Measured(NamedTuple):
    """Seconds of each step, and of each part over all of them. `base_bytes`: memory before the first step."""

    seconds: list[float]
    spent: dict[str, float]
    base_bytes: int


def measure(task: Task, run: AnyRun, batches: Iterator[Any], clock: Clock, steps: int) -> Measured:
    """Trains `WARM_UP` steps and then `steps` measured ones. Collective."""
    base = peak_bytes(clock.device)
    seconds: list[float] = []
    spent: dict[str, float] = {}
    batches = _timed(batches, clock)
    for step in range(WARM_UP + steps):
        task.set_rates(step * run.train.global_batch)
        dist.barrier()
        clock.reset()
        task.train_step(batches)
        parts = clock.seconds()
        if step >= WARM_UP:
            seconds.append(sum(parts.values()))
            for name, value in parts.items():
                spent[name] = spent.get(name, 0.0) + value
    return Measured(seconds, spent, base)


def _timed(batches: Iterator[Any], clock: Clock) -> Iterator[Any]:
    """The same batches, with the wait for each counted for `DATA`."""
    while True:
        with clock.part(DATA):
            batch = next(batches)
        yield batch
