"""Settings that a config leaves open (``auto``), chosen for a machine by the plan's memory and step time.

The choice is a function of the config and the machine alone, so all ranks make the same one. What a config sets is
kept. The global batch, the rates and the schedule never change: the choice decides how a step is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import torch

from ibq_scale.config.base import AUTO, OPEN
from ibq_scale.config.batch import accumulation_steps
from ibq_scale.config.deepspeed import UNSETTLED
from ibq_scale.config.layers import with_values
from ibq_scale.config.run import AnyRun, ARRun, TokenizerRun
from ibq_scale.data.shared_memory import ranks_of_node
from ibq_scale.distributed.agree import of_all_ranks
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.scaling.devices import BOARDS
from ibq_scale.scaling.fitting import budget_of, largest_micro_batch
from ibq_scale.scaling.plan import Machine, Plan, fastest_group, make_plan

MICRO_BATCH, GROUP, ZERO, AGAIN = (
    "train.micro_batch",
    "codebook_group",
    "deepspeed.config",
    "model.activation_checkpointing",
)
# Of a GPU's memory, the share that a plan may fill: a plan is held to within 10 % of the allocator.
HEADROOM = 0.9
# A later candidate has to be this much faster than an earlier one, which is simpler.
FASTER = 0.98
# By what they cost. Offloading is tried where nothing else fits.
STAGES, OFFLOADS = ("zero1", "zero2", "zero3"), ("zero2_offload", "zero3_offload")
CHECKPOINTING = ("none", "selective", "full")
# Where no GPU's memory is known.
SMALL_MICRO_BATCH = 4
R = TypeVar("R", bound=AnyRun)


@dataclass(frozen=True)
class Choice:
    """A setting that the config leaves open, its value here, and why."""

    key: str
    value: Any
    reason: str


def open_keys(run: AnyRun) -> tuple[str, ...]:
    """The settings of this run that are ``auto``."""
    is_open = {
        MICRO_BATCH: run.train.micro_batch == OPEN,
        GROUP: isinstance(run, TokenizerRun) and run.codebook_group == OPEN,
        ZERO: run.deepspeed.config == AUTO,
        AGAIN: isinstance(run, ARRun) and run.model.activation_checkpointing == AUTO,
    }
    return tuple(key for key, left in is_open.items() if left)


def machine_of(world: World) -> Machine:
    """The machine of a running job. Among different GPUs the one with the least memory counts. Collective."""
    found: tuple[float, str] | None = None
    if world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(world.device)
        found = float(properties.total_memory), properties.name
    everyone = of_all_ranks(world, (found, ranks_of_node()))
    node = min(size for _, size in everyone)
    if world.size % node:
        node = 1
    gpus = [gpu for gpu, _ in everyone if gpu is not None]
    if len(gpus) < world.size:
        return Machine(node, world.size // node)
    memory, name = min(gpus)
    return Machine(node, world.size // node, BOARDS.get(name, name), memory)


def settle(run: R, machine: Machine) -> tuple[R, tuple[Choice, ...]]:
    """The run with a value for each open setting, and the choices with their reasons.

    UserError where no micro-batch divides the global batch over these ranks, or where nothing fits the GPU's memory.
    """
    keys = open_keys(run)
    if not keys:
        return run, ()
    one = with_values(run, {MICRO_BATCH: 1}) if MICRO_BATCH in keys else run
    share = accumulation_steps(one.train, machine.world) * one.train.micro_batch
    if machine.gpu_memory is None:
        values = _without_memory(keys, share)
        return with_values(run, values), tuple(
            Choice(key, values[key], "no GPU's memory is known here") for key in keys
        )
    found = _fastest(run, keys, machine, machine.gpu_memory * HEADROOM)
    if found is None:
        raise UserError(_too_small(one, keys, machine))
    values, plan = found
    return with_values(run, values), tuple(Choice(key, values[key], _reason(key, plan)) for key in keys)


def _without_memory(keys: tuple[str, ...], share: int) -> dict[str, Any]:
    small = max(m for m in range(1, SMALL_MICRO_BATCH + 1) if share % m == 0)
    values = {MICRO_BATCH: small, GROUP: 0, ZERO: UNSETTLED, AGAIN: CHECKPOINTING[0]}
    return {key: values[key] for key in keys}


def _fastest(run: AnyRun, keys: tuple[str, ...], machine: Machine, memory: float) -> tuple[dict[str, Any], Plan] | None:
    """The values with the shortest step among those that fit `memory` bytes, None where none fit."""
    best: tuple[float, dict[str, Any], Plan] | None = None
    for stages in (STAGES, OFFLOADS):
        for values in _candidates(keys, stages):
            # Computing again saves micro-batches and nothing else.
            if best is not None and best[2].accumulation == 1 and values.get(AGAIN) != best[1].get(AGAIN):
                break
            fitting = _fitted(run, values, keys, machine, memory)
            if fitting is None:
                continue
            plan = make_plan(with_values(run, fitting), machine, mfu=0.5)
            # Of a GPU without a data sheet only the number of micro-batches can be compared.
            seconds = plan.roofline.total if plan.roofline is not None else float(plan.accumulation)
            if best is None or seconds < FASTER * best[0]:
                best = seconds, fitting, plan
        if best is not None or ZERO not in keys:
            break
    return None if best is None else best[1:]


def _candidates(keys: tuple[str, ...], stages: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Values of the settings that are single choices, the simplest first."""
    options = {ZERO: stages, AGAIN: CHECKPOINTING}
    named = [key for key in (AGAIN, ZERO) if key in keys]
    for values in product(*(options[key] for key in named)):
        yield dict(zip(named, values, strict=True))


def _fitted(
    run: AnyRun, values: dict[str, Any], keys: tuple[str, ...], machine: Machine, memory: float
) -> dict[str, Any] | None:
    """The candidate with the codebook's group and the largest micro-batch that fit. None if no image fits."""
    if GROUP in keys:
        assert isinstance(run, TokenizerRun)
        values = values | {GROUP: fastest_group(run, machine)}
    world = machine.world
    try:
        if MICRO_BATCH not in keys:
            return values if budget_of(with_values(run, values), world).peak <= memory else None
        trial = with_values(run, values | {MICRO_BATCH: 1})
        largest = largest_micro_batch(trial, world, memory)
    except UserError:
        # What training refuses, such as ZeRO-3 under torch.compile.
        return None
    return values | {MICRO_BATCH: largest} if largest else None


def _reason(key: str, plan: Plan) -> str:
    memory = plan.machine.gpu_memory
    assert memory is not None
    full = f"{plan.memory.peak / 1e9:.1f} of {memory / 1e9:.0f} GB"
    if key == MICRO_BATCH:
        return f"{full}, {plan.accumulation} accumulation"
    if key == GROUP:
        return "the fewest seconds of exchange on these links"
    return f"the shortest step that fits: {full}"


def _too_small(run: AnyRun, keys: tuple[str, ...], machine: Machine) -> str:
    smallest = {ZERO: OFFLOADS[-1], AGAIN: CHECKPOINTING[-1], GROUP: 0}
    values = {key: smallest[key] for key in keys if key in smallest}
    least = budget_of(with_values(run, values), machine.world).peak
    memory = machine.gpu_memory
    assert memory is not None
    return (
        f"{run.name} does not fit {machine.world} GPUs of {memory / 1e9:.0f} GB: at least {least / HEADROOM / 1e9:.0f} "
        f"GB a GPU are needed. Take more GPUs, larger ones, or a smaller model"
    )
