"""Settings that a config leaves open (``auto``), chosen for a machine by the plan's memory and step time.

The choice is a function of the config and the machine alone, so all ranks make the same one. What a config sets is
kept. The global batch, the rates and the schedule never change: the choice decides how a step is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

import torch

from ibq_scale.config.base import AUTO, OPEN
from ibq_scale.config.batch import accumulation_steps
from ibq_scale.config.deepspeed import UNSETTLED
from ibq_scale.config.layers import with_values
from ibq_scale.config.run import AnyRun, ARRun, TokenizerRun
from ibq_scale.data.shared_memory import USUAL_WORKERS, cpus_of_rank, ranks_of_node, workers_within
from ibq_scale.distributed.agree import by_rank_0, of_all_ranks
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.scaling.activation_memory import estimated
from ibq_scale.scaling.devices import BOARDS
from ibq_scale.scaling.fitting import budget_of, largest_micro_batch
from ibq_scale.scaling.flops import training_flops
from ibq_scale.scaling.plan import Machine, Plan, fastest_group, make_plan, measured_rates
from ibq_scale.scaling.profile import StepRate, read_profile, this_cpu

MICRO_BATCH, GROUP, ZERO, AGAIN, WORKERS = (
    "train.micro_batch",
    "codebook_group",
    "deepspeed.config",
    "model.activation_checkpointing",
    "data.workers",
)
# Assumed: pictures of 500 × 375 pixels, decoded and cropped by a CPU in a second. Codes need one worker.
DECODED = 200
# Usable share of a GPU's memory: a plan is held to within 10 % of the allocator.
HEADROOM = 0.9
# Estimates of activations are at most this much too large.
ESTIMATE = 1.03
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
    """This run's settings with the value ``auto``."""
    is_open = {
        MICRO_BATCH: run.train.micro_batch == OPEN,
        GROUP: isinstance(run, TokenizerRun) and run.codebook_group == OPEN,
        ZERO: run.deepspeed.config == AUTO,
        AGAIN: isinstance(run, ARRun) and run.model.activation_checkpointing == AUTO,
        WORKERS: run.data.workers == OPEN,
    }
    return tuple(key for key, left in is_open.items() if left)


def machine_of(world: World) -> Machine:
    """The machine of a running job. Among different GPUs the one with the least memory counts. Collective: rank 0 reads
    its measured profile.
    """
    found: tuple[float, str] | None = None
    if world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(world.device)
        found = float(properties.total_memory), properties.name
    everyone = of_all_ranks(world, (found, ranks_of_node(), cpus_of_rank()))
    node, cpus = (min(numbers) for numbers in ([size for _, size, _ in everyone], [few for _, _, few in everyone]))
    if world.size % node:
        node = 1
    gpus = [gpu for gpu, _, _ in everyone if gpu is not None]
    if len(gpus) < world.size:
        cpu = by_rank_0(world, lambda: read_profile(this_cpu(torch.get_num_threads())))
        return Machine(node, world.size // node, profile=cpu, cpus=cpus)
    memory, name = min(gpus)
    measured = by_rank_0(world, lambda: read_profile(name))
    return Machine(node, world.size // node, BOARDS.get(name, name), memory, profile=measured, cpus=cpus)


def settle(run: R, machine: Machine, most: int | None = None) -> tuple[R, tuple[Choice, ...]]:
    """The run with a value for each open setting, and the choices with their reasons.

    `most`: the largest open micro-batch that may be chosen, after a larger one ran out of memory. UserError where no
    micro-batch divides the global batch over these ranks, or where nothing fits the GPU's memory.
    """
    keys = tuple(key for key in open_keys(run) if key != WORKERS)
    plan, choices = _settle_step(run, keys, machine, most) if keys else (None, ())
    if run.data.workers == OPEN:
        choices = (*choices, _workers(run, machine, plan))
    return with_values(run, {choice.key: choice.value for choice in choices}) if choices else run, choices


def _settle_step(
    run: AnyRun, keys: tuple[str, ...], machine: Machine, most: int | None
) -> tuple[Plan | None, tuple[Choice, ...]]:
    """The choices of a step's computation, and their plan where the GPU's memory is known."""
    one = with_values(run, {MICRO_BATCH: 1}) if MICRO_BATCH in keys else run
    share = accumulation_steps(one.train, machine.world) * one.train.micro_batch
    if machine.gpu_memory is None:
        sizes = [m for m in _divisors(share) if most is None or m <= most]
        return None, _without_memory(one, keys, machine, sizes)
    found = _fastest(run, keys, machine, machine.gpu_memory * HEADROOM, most)
    if found is None:
        raise UserError(_too_small(one, keys, machine))
    values, plan = found
    return plan, tuple(Choice(key, values[key], _reason(key, plan)) for key in keys)


def _workers(run: AnyRun, machine: Machine, plan: Plan | None) -> Choice:
    """Data workers: as many as the step needs, within the rank's CPUs."""
    needed, why = USUAL_WORKERS, "where the step's time is not known"
    if isinstance(run, ARRun):
        needed, why = 1, "for codes"
    elif plan is not None and plan.predicted_s is not None:
        rate = run.train.global_batch / machine.world / plan.predicted_s
        needed, why = math.ceil(rate / DECODED), f"for {rate:,.0f} images/s a rank at {DECODED} a CPU (assumed)"
    if machine.cpus is None:
        return Choice(WORKERS, max(1, needed), f"{why}; the nodes' CPUs are not known here")
    return Choice(WORKERS, workers_within(machine.cpus, needed), f"{why}, of {machine.cpus} CPUs a rank")


def _divisors(share: int) -> list[int]:
    return [m for m in range(1, share + 1) if share % m == 0]


def _without_memory(run: AnyRun, keys: tuple[str, ...], machine: Machine, sizes: list[int]) -> tuple[Choice, ...]:
    """Constants, or the micro-batch of `sizes` with the best measured rate. `run`: with a micro-batch."""
    unknown = "no GPU's memory is known here"
    small = max(m for m in sizes if m <= SMALL_MICRO_BATCH)
    choices = {
        MICRO_BATCH: Choice(MICRO_BATCH, small, unknown),
        GROUP: Choice(GROUP, 0, unknown),
        ZERO: Choice(ZERO, UNSETTLED, unknown),
        AGAIN: Choice(AGAIN, CHECKPOINTING[0], unknown),
    }
    rates = [rate for rate in _rates(run, machine) if rate.micro_batch in sizes]
    if rates:
        best = max(rates, key=lambda rate: rate.flops_per_s)
        choices[MICRO_BATCH] = Choice(MICRO_BATCH, best.micro_batch, f"the fastest; {best}")
    return tuple(choices[key] for key in keys)


def _rates(run: AnyRun, machine: Machine) -> list[StepRate]:
    return measured_rates(run, machine, training_flops(run)) if machine.profile and machine.profile.rates else []


def _fastest(
    run: AnyRun, keys: tuple[str, ...], machine: Machine, memory: float, most: int | None
) -> tuple[dict[str, Any], Plan] | None:
    """The values with the shortest step among those that fit `memory` bytes, None where none fit.

    The search estimates the activations. What it finds is rehearsed, and the next smaller one searched if it is larger.
    """
    allowed = ESTIMATE * memory
    while True:
        with estimated():
            found = _search(run, keys, machine, allowed, most)
        if found is None:
            return None
        values, plan = found
        exact = budget_of(with_values(run, values), machine.world)
        if exact.peak <= memory:
            return values, replace(plan, memory=exact)
        allowed = plan.memory.peak - 1


def _search(
    run: AnyRun, keys: tuple[str, ...], machine: Machine, memory: float, most: int | None
) -> tuple[dict[str, Any], Plan] | None:
    """`_fastest` by estimates."""
    best: tuple[float, dict[str, Any], Plan] | None = None
    for stages in (STAGES, OFFLOADS):
        for values in _candidates(keys, stages):
            # Computing again saves micro-batches and nothing else.
            if best is not None and best[2].accumulation == 1 and values.get(AGAIN) != best[1].get(AGAIN):
                break
            for fitting in _fitted(run, values, keys, machine, memory, most):
                plan = make_plan(with_values(run, fitting), machine, mfu=0.5)
                # Of a GPU without a data sheet only the number of micro-batches can be compared.
                seconds = plan.predicted_s or float(plan.accumulation)
                if best is None or seconds < FASTER * best[0]:
                    best = seconds, fitting, plan
        if best is not None or ZERO not in keys:
            break
    return None if best is None else best[1:]


def _candidates(keys: tuple[str, ...], stages: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Values of the settings with few choices, the simplest first."""
    options = {ZERO: stages, AGAIN: CHECKPOINTING}
    named = [key for key in (AGAIN, ZERO) if key in keys]
    for values in product(*(options[key] for key in named)):
        yield dict(zip(named, values, strict=True))


def _fitted(
    run: AnyRun, values: dict[str, Any], keys: tuple[str, ...], machine: Machine, memory: float, most: int | None
) -> list[dict[str, Any]]:
    """The candidate with the codebook's group and the largest micro-batch that fit, then the smaller measured ones.

    Empty if no image fits.
    """
    if GROUP in keys:
        assert isinstance(run, TokenizerRun)
        values = values | {GROUP: fastest_group(run, machine)}
    world = machine.world
    try:
        if MICRO_BATCH not in keys:
            return [values] if budget_of(with_values(run, values), world).peak <= memory else []
        trial = with_values(run, values | {MICRO_BATCH: 1})
        largest = largest_micro_batch(trial, world, memory, most)
    except UserError:
        # What training refuses, such as ZeRO-3 under torch.compile.
        return []
    measured = {rate.micro_batch for rate in _rates(trial, machine)}
    share = run.train.global_batch // world
    smaller = [m for m in sorted(measured, reverse=True) if m < largest and share % m == 0]
    return [values | {MICRO_BATCH: size} for size in [largest, *smaller] if size]


def _reason(key: str, plan: Plan) -> str:
    memory = plan.machine.gpu_memory
    assert memory is not None
    full = f"{plan.memory.peak / 1e9:.1f} of {memory / 1e9:.0f} GB"
    if plan.time.measured:
        full += f", {plan.time.basis}"
    if key == MICRO_BATCH:
        return f"{full}, {plan.accumulation} accumulation"
    if key == GROUP:
        return "the fewest seconds of exchange on these links"
    return f"the shortest step that fits: {full}"


def _too_small(run: AnyRun, keys: tuple[str, ...], machine: Machine) -> str:
    least = _least_peak(run, keys, machine)
    memory = machine.gpu_memory
    assert memory is not None
    return (
        f"{run.name} does not fit {machine.world} GPUs of {memory / 1e9:.0f} GB: at least {least / HEADROOM / 1e9:.0f} "
        f"GB a GPU are needed. Take more GPUs, larger ones, or a smaller model"
    )


def _least_peak(run: AnyRun, keys: tuple[str, ...], machine: Machine) -> float:
    """Bytes of a GPU with the smallest value of each setting. UserError if training refuses every ZeRO stage."""
    values = {key: value for key, value in ((AGAIN, CHECKPOINTING[-1]), (GROUP, 0)) if key in keys}
    for stage in reversed(STAGES + OFFLOADS) if ZERO in keys else ():
        with suppress(UserError):
            return budget_of(with_values(run, values | {ZERO: stage}), machine.world).peak
    return budget_of(with_values(run, values), machine.world).peak
