"""The declared list of configurations: overrides on one preset, each with the seeds 0, 1, 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ibq_scale.errors import UserError

PRESET = "tokenizer/experiment"
SEEDS = (0, 1, 2)

Group = Literal["collapse", "ladder", "terms", "dimension", "batch", "rate", "pictures", "long", "usage", "large"]
Pictures = Literal["photographs", "ten"]
"""The source of a run's tiles: the given pictures, or ten not from ImageNet (tiles.py)."""

# The published loss without one of its parts.
_DOUBLE = "quantizer.double_quantization=false"
_STRAIGHT = "quantizer.straight_through=false"
_ENTROPY = "loss.entropy_weight=0"
_SLOW = "optimizer.lr=1e-3"
# For the whole ladder. 262,144 codes on a CPU allow no more.
_SHORT = ("train.global_batch=8", "train.micro_batch=8", "train.steps=100", "train.log_every=25")
# Usage near an even one: a slower encoder, a codebook with a rate of its own, a softer entropy.
_RATES = ("optimizer.lr=1e-3", "optimizer.codebook_lr=1e-2")
_SOFT = "quantizer.entropy_temperature=0.3"


@dataclass(frozen=True)
class Configuration:
    """One row of docs/experiments.md. `name`: its folder and label. `overrides`: on top of the preset."""

    name: str
    group: Group
    overrides: tuple[str, ...] = ()
    pictures: Pictures = "photographs"


@dataclass(frozen=True)
class Trial:
    """A configuration with a seed: one training run."""

    configuration: Configuration
    seed: int

    @property
    def name(self) -> str:
        """Its folder: ``ibq-1024/seed-0``."""
        return f"{self.configuration.name}/seed-{self.seed}"


def _k(size: int) -> str:
    return f"quantizer.codebook_size={size}"


CONFIGURATIONS = (
    Configuration("ibq-1024", "collapse"),
    Configuration("vq-1024", "collapse", ("quantizer.kind=vq",)),
    Configuration("ibq-16384", "collapse", (_k(16384),)),
    Configuration("vq-16384", "collapse", (_k(16384), "quantizer.kind=vq")),
    Configuration("no-double", "terms", (_DOUBLE,)),
    Configuration("no-straight", "terms", (_STRAIGHT,)),
    Configuration("no-entropy", "terms", (_ENTROPY,)),
    Configuration("only-double", "terms", (_STRAIGHT, _ENTROPY)),
    Configuration("only-straight", "terms", (_DOUBLE, _ENTROPY)),
    Configuration("only-entropy", "terms", (_DOUBLE, _STRAIGHT)),
    Configuration("no-term", "terms", (_DOUBLE, _STRAIGHT, _ENTROPY)),
    Configuration("slow-all", "rate", (_SLOW,)),
    Configuration("slow-no-double", "rate", (_SLOW, _DOUBLE)),
    Configuration("slow-no-straight", "rate", (_SLOW, _STRAIGHT)),
    Configuration("slow-no-entropy", "rate", (_SLOW, _ENTROPY)),
    Configuration("dim-8", "dimension", ("quantizer.dim=8",)),
    Configuration("dim-16", "dimension", ("quantizer.dim=16",)),
    Configuration("dim-256", "dimension", ("quantizer.dim=256",)),
    Configuration("batch-128", "batch", ("train.global_batch=2", "train.micro_batch=2")),
    Configuration("ten-ibq-1024", "pictures", (), "ten"),
    Configuration("ten-vq-1024", "pictures", ("quantizer.kind=vq",), "ten"),
    Configuration("short-1024", "ladder", _SHORT),
    Configuration("short-16384", "ladder", (*_SHORT, _k(16384))),
    Configuration("short-262144", "ladder", (*_SHORT, _k(262144))),
    Configuration("long-ibq-16384", "long", (_k(16384), "train.steps=480")),
    Configuration("long-vq-16384", "long", (_k(16384), "train.steps=480", "quantizer.kind=vq")),
    Configuration("even-ibq", "usage", (_k(16384), *_RATES, _SOFT)),
    Configuration("even-vq", "usage", (_k(16384), *_RATES, "quantizer.kind=vq")),
    Configuration("even-not-soft", "usage", (_k(16384), *_RATES)),
    Configuration("even-one-rate", "usage", (_k(16384), _RATES[0], _SOFT)),
    Configuration("even-only-soft", "usage", (_k(16384), _SOFT)),
    Configuration("even-262144", "large", (*_SHORT, _k(262144), *_RATES, _SOFT)),
)


def trials(only: Sequence[str] = (), seeds: Sequence[int] = SEEDS) -> list[Trial]:
    """Every configuration, or those named in `only`, with each of `seeds`.

    All with the first seed come first, then all with the next one, so an early end leaves whole rows. The long ones
    come last. UserError for an unknown name.
    """
    names = [c.name for c in CONFIGURATIONS]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UserError(f"no configuration named {', '.join(unknown)}: there are {', '.join(names)}")
    chosen = [c for c in CONFIGURATIONS if not only or c.name in only]
    passes = [[c for c in chosen if (c.group == "long") == last] for last in (False, True)]
    return [Trial(c, seed) for part in passes for seed in seeds for c in part]
