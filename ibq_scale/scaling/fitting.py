"""Fitting a run to a GPU: the largest micro-batch, and switches to make a run fit."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ibq_scale.config.deepspeed import deepspeed_config
from ibq_scale.config.layers import with_values
from ibq_scale.config.run import AnyRun, TokenizerRun
from ibq_scale.errors import UserError
from ibq_scale.scaling import networks
from ibq_scale.scaling.budget import MemoryBudget, ar_budget, tokenizer_budget
from ibq_scale.zero.memory import Zero

# In order of cost: sharding states costs little, then comes more traffic, then the host's bus.
ZERO = ("zero2", "zero3", "zero2_offload", "zero3_offload")
CODEBOOK_LINES = ("codebook", "quantizer's work")


@dataclass(frozen=True)
class Switch:
    """Overrides to make a run fit, and its peak with them (bytes)."""

    words: tuple[str, ...]
    peak: int


def budget_of(run: AnyRun, world: int) -> MemoryBudget:
    """A GPU's memory. UserError for configs refused by training."""
    zero = Zero.of(deepspeed_config(run, world), world=world)
    if isinstance(run, TokenizerRun):
        nets = networks.autoencoder(run), networks.discriminator(run.discriminator)
        return tokenizer_budget(run, zero, *nets, networks.frozen(run))
    return ar_budget(run, zero, networks.transformer(run))


def other_bytes(run: TokenizerRun, world: int) -> float:
    """A tokenizer's peak without the codebook. Its micro-batch does not depend on the ranks."""
    batch = run.train.model_copy(update={"global_batch": run.train.micro_batch * world})
    budget = budget_of(run.model_copy(update={"train": batch, "codebook_group": 1}), world)
    own = [line for line in budget.lines if line.name.startswith(CODEBOOK_LINES)]
    return max(budget.passes - sum(line.passes for line in own), budget.step - sum(line.step for line in own))


def largest_micro_batch(run: AnyRun, world: int, memory: float, most: int | None = None) -> int:
    """The largest micro-batch that divides the global batch on these ranks and fits. 0 if no image fits.

    `most`: the largest one to consider, None for all.
    """
    share = run.train.global_batch // world
    fitting = [m for m in range(1, share + 1) if share % m == 0 and (most is None or m <= most)]

    def fits(size: int) -> bool:
        return budget_of(with_values(run, {"train.micro_batch": size}), world).peak <= memory

    # Memory grows with the micro-batch: bisection, from the run's own, already known.
    low, high, middle = 0, len(fitting), bisect(fitting, run.train.micro_batch) - 1
    while low < high:
        low, high = (middle + 1, high) if fits(fitting[middle]) else (low, middle)
        middle = (low + high) // 2
    return fitting[low - 1] if low else 0


def switches(run: AnyRun, world: int, memory: float) -> list[Switch]:
    """Single changes to make a run fit, the cheapest first. If there is none, the first pair."""
    options = list(_options(run, world))
    found = [fit for words in options if (fit := _fits(run, [words], world, memory))]
    # The last switch of a key saves most. If all keys together do not suffice, no pair does.
    together = list({word.partition("=")[0]: word for word in options}.values())
    if found or _fits(run, together, world, memory) is None:
        return found
    for i, one in enumerate(options):
        for two in options[i + 1 :]:
            fit = _fits(run, [one, two], world, memory)
            if fit is not None and one.partition("=")[0] != two.partition("=")[0]:
                return [fit]
    return []


def _options(run: AnyRun, world: int) -> Iterator[str]:
    if isinstance(run, TokenizerRun):
        if run.codebook_group not in (0, world) and run.quantizer.codebook_size % world == 0:
            yield "codebook_group=0"
    elif run.model.activation_checkpointing == "none":
        yield "model.activation_checkpointing=selective"
    known = ZERO.index(run.deepspeed.config) if run.deepspeed.config in ZERO else -1
    if world > 1 and known < 0:
        yield "deepspeed.config=zero2"
    if isinstance(run, TokenizerRun):
        if not run.model.activation_checkpointing:
            yield "model.activation_checkpointing=true"
    elif run.model.activation_checkpointing != "full":
        yield "model.activation_checkpointing=full"
    share = run.train.global_batch // world
    smaller = [m for m in range(1, run.train.micro_batch) if share % m == 0]
    if smaller:
        yield f"train.micro_batch={smaller[-1]}"
        yield from [f"train.micro_batch={smaller[0]}"] if len(smaller) > 1 else []
    for name in ZERO[max(known, 0) + 1 :]:
        if world > 1 or "offload" in name:
            yield f"deepspeed.config={name}"


def _fits(run: AnyRun, words: Sequence[str], world: int, memory: float) -> Switch | None:
    try:
        peak = budget_of(_with_words(run, words), world).peak
    except UserError:
        # Refused by training, such as ZeRO-3 with fp8.
        return None
    return Switch(tuple(words), peak) if peak <= memory else None


def _with_words(run: AnyRun, words: Sequence[str]) -> AnyRun:
    import yaml

    pairs = (word.partition("=") for word in words)
    return with_values(run, {key: yaml.safe_load(text) for key, _, text in pairs})
