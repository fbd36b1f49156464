"""The rungs of a ladder: the ``ibq-scale train ar`` run of each, and its cost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ibq_scale.config.layers import resolve
from ibq_scale.config.run import ARRun
from ibq_scale.errors import UserError
from ibq_scale.ladder.schema import PLACE, LadderConfig, SizeConfig
from ibq_scale.scaling.flops import ar_flops
from ibq_scale.scaling.plan import Machine, Plan, make_plan

RUNS, CODES = "rungs", "codes"
PARTS = ("train", "held-out")


@dataclass(frozen=True)
class Rung:
    """One run, by ``ibq-scale train ar PRESET WORDS``."""

    name: str
    size: str
    codebook: int
    seed: int
    preset: str
    words: tuple[str, ...]
    run: ARRun

    @property
    def folder(self) -> Path:
        return Path(self.run.run_dir)

    @property
    def tokens(self) -> int:
        """Codes of training, in total."""
        return self.run.train.total_samples * self.run.model.tokens

    @property
    def flops(self) -> float:
        """Of the whole training."""
        return sum(ar_flops(self.run.model).values()) * self.run.train.total_samples


def rungs_of(ladder: LadderConfig) -> list[Rung]:
    """All rungs, the cheapest first. UserError for an invalid config, or a budget below one step."""
    budgets: list[tuple[str, float | None]] = [("", None)]
    if ladder.budget.samples:
        budgets = [(f"-{count}", float(count)) for count in ladder.budget.samples]
    elif ladder.budget.flops:
        budgets = [(f"-{flops:.3g}".replace("+", ""), flops) for flops in ladder.budget.flops]
    combined = itertools.product(ladder.sizes, budgets, ladder.codes.codebooks, ladder.seeds)
    rungs = [_rung(ladder, size, *budget, codebook, seed) for size, budget, codebook, seed in combined]
    return sorted(rungs, key=lambda rung: rung.flops)


def plans_of(ladder: LadderConfig, rungs: list[Rung]) -> Iterator[tuple[Rung, Plan]]:
    """Each rung with its plan on the ladder's machine."""
    machine = Machine(ladder.machine.gpus, ladder.machine.nodes, ladder.machine.device)
    for rung in rungs:
        yield rung, make_plan(rung.run, machine, mfu=ladder.machine.mfu)


def code_urls(ladder: LadderConfig, codebook: int) -> tuple[str, str | None]:
    """URLs of the training codes and of the held-out codes."""
    if ladder.tiles is not None:
        train, held_out = (str(ladder.folder / CODES / str(codebook) / part) for part in PARTS)
        return train, held_out
    train, validation = ladder.codes.train, ladder.codes.validation
    return train.replace(PLACE, str(codebook)), validation and validation.replace(PLACE, str(codebook))


def _rung(ladder: LadderConfig, size: SizeConfig, label: str, budget: float | None, codebook: int, seed: int) -> Rung:
    preset = size.preset or ladder.preset
    name = f"{size.name}{label}-k{codebook}-seed{seed}"
    train, validation = code_urls(ladder, codebook)
    sizes = {key: getattr(size, key) for key in ("depth", "heads", "width")}
    words = [
        *(f"model.{key}={value}" for key, value in sizes.items() if value is not None),
        *ladder.overrides,
        *size.overrides,
        f"name={ladder.name}-{name}",
        f"out={ladder.folder / RUNS / name}",
        f"train.seed={seed}",
        f"data.train={train}",
        f"model.codebook_size={codebook}",
    ]
    if validation is not None:
        words.append(f"validation.data={validation}")
    run = _resolved(preset, words)
    if budget is not None:
        words.append(f"train.samples={_samples(run, budget, name, in_flops=bool(ladder.budget.flops))}")
        run = _resolved(preset, words)
    words += [f"optimizer.lr={_rate(ladder, run):.6g}"]
    if ladder.warmup is not None:
        words.append(f"schedule.warmup_samples={round(ladder.warmup * run.train.total_samples)}")
    if validation is not None:
        # Once, at the end.
        words.append(f"validation.every={run.train.total_steps}")
    return Rung(name, size.name, codebook, seed, preset, tuple(words), _resolved(preset, words))


def _resolved(preset: str, words: list[str]) -> ARRun:
    run = resolve(preset, words, "ar").config
    assert isinstance(run, ARRun)
    return run


def _samples(run: ARRun, budget: float, name: str, *, in_flops: bool) -> int:
    """Whole steps within the budget."""
    samples = int(budget / sum(ar_flops(run.model).values())) if in_flops else int(budget)
    batch = run.train.global_batch
    if samples < batch:
        raise UserError(f"{name}: its budget is {samples} images, less than one train.global_batch ({batch})")
    return samples // batch * batch


def _rate(ladder: LadderConfig, run: ARRun) -> float:
    lr = ladder.rate.lr or run.optimizer.lr
    if ladder.rate.rule == "constant":
        return lr
    assert ladder.rate.base_width is not None
    return lr * ladder.rate.base_width / run.model.width
