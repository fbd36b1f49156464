"""The stability bench: usage over time of every quantizer from codebooks that start too small or too large.

UR-AUC (StableVQ, arXiv 2609.26774): mean over initial scales m of 1/(T − t0) ∫ usage_m dt, in per cent. Usage is the
share of the codes chosen by the newest `window` tokens, and t0 is the first step with a whole window. The encoder is
frozen, so the codebook alone moves. The decoder then is the identity: IBQ's first term, mean‖z_q − z‖², takes the
place of its reconstruction loss.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ibq_scale.config.layers import resolve
from ibq_scale.config.run import TokenizerRun
from ibq_scale.errors import UserError
from ibq_scale.experiments.plan import PRESET, SEEDS
from ibq_scale.experiments.results import load_rows, save_rows
from ibq_scale.quantize.kinds import KINDS

RESULTS = "stability.json"
FOLDER = "stability"
SCALES = (0.01, 0.1, 1.0, 10.0)
CODES = (1024, 16384)
# Steps between two points of a curve.
EVERY = 4
# Adam has few steps here: at the published 1e-4 no code would move by a hundredth of the features' scale.
RATE = "optimizer.lr=1e-2"


@dataclass(frozen=True)
class Variant:
    """A row of the table. `overrides`: on top of the experiments' preset, without the sizes."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()


_VQ, _SIMVQ, _REGION = "quantizer.kind=vq", "quantizer.kind=simvq", "quantizer.region=true"
# Dynamic and rotated gradients reach the encoder alone, which is frozen: they would repeat the rows of VQ and SimVQ.
VARIANTS = (
    Variant("ibq", "IBQ"),
    Variant("ibq-soft", "IBQ, τ = 0.1", ("quantizer.entropy_temperature=0.1",)),
    Variant("ibq-region", "IBQ, region", (_REGION,)),
    Variant("ibq-l2", "IBQ, unit length", ("quantizer.l2_normalize=true",)),
    Variant("vq", "VQ", (_VQ,)),
    Variant("vq-region", "VQ, region", (_VQ, _REGION)),
    Variant("simvq", "SimVQ", (_SIMVQ,)),
    Variant("simvq-region", "SimVQ, region", (_SIMVQ, _REGION)),
    Variant("lfq", "LFQ", ("quantizer.kind=lfq",)),
    Variant("fsq", "FSQ", ("quantizer.kind=fsq",)),
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of every run. `window`: tokens behind one value of the usage, as published."""

    steps: int = 96
    window: int = 65_536
    more: tuple[str, ...] = ()
    """Overrides of all runs, of the encoder's training too."""


@dataclass(frozen=True)
class Trial:
    """One curve. `scale`: root mean square of the first codes over that of the features, None for fixed codes."""

    variant: Variant
    codes: int
    scale: float | None
    seed: int

    @property
    def file(self) -> str:
        """Its result below the bench's folder: ``ibq-1024/scale-0.1-seed-0.json``."""
        start = "" if self.scale is None else f"scale-{self.scale:g}-"
        return f"{self.variant.name}-{self.codes}/{start}seed-{self.seed}.json"

    def run(self, more: Sequence[str] = ()) -> TokenizerRun:
        """The config of its codebook. UserError for a size impossible for its kind."""
        words = [RATE, f"quantizer.codebook_size={self.codes}", *_shape(self.variant, self.codes)]
        words += [*self.variant.overrides, f"train.seed={self.seed}", *more]
        config = resolve(PRESET, words, "tokenizer").config
        assert isinstance(config, TokenizerRun)
        return config


@dataclass(frozen=True)
class Curve:
    """The result of a trial. `usage` (0 to 1) at each of `steps`, over the newest `window` tokens."""

    name: str
    codes: int
    scale: float | None
    seed: int
    dim: int
    lr: float
    batch_tokens: int
    window: int
    features: str
    steps: list[int]
    usage: list[float]
    cpu_seconds: float
    torch: str

    @property
    def area(self) -> float:
        """1/(T − t0) ∫ usage dt by the trapezoidal rule, 0 to 1."""
        if len(self.steps) == 1:
            return self.usage[0]
        pairs = itertools.pairwise(zip(self.steps, self.usage, strict=True))
        whole = sum((t1 - t0) * (u0 + u1) / 2 for (t0, u0), (t1, u1) in pairs)
        return whole / (self.steps[-1] - self.steps[0])


def trials(
    only: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    codes: Sequence[int] = CODES,
    scales: Sequence[float] = SCALES,
) -> list[Trial]:
    """Every curve, the small codebooks first, and all of a seed before the next. UserError for an unknown name."""
    names = [v.name for v in VARIANTS]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UserError(f"no row named {', '.join(unknown)}: there are {', '.join(names)}")
    chosen = [v for v in VARIANTS if not only or v.name in only]
    return [
        Trial(variant, size, scale, seed)
        for size in codes
        for seed in seeds
        for variant in chosen
        for scale in (scales if KINDS[_kind(variant)].learns != "nothing" else (None,))
    ]


def ur_auc(curves: Sequence[Curve]) -> list[float]:
    """UR-AUC of each seed of one row and size, in per cent: the mean over its scales."""
    seeds = sorted({c.seed for c in curves})
    return [100 * statistics.fmean(c.area for c in curves if c.seed == seed) for seed in seeds]


def save(curves: Sequence[Curve], path: Path) -> None:
    save_rows(path, "curves", curves)


def load(path: Path) -> list[Curve]:
    return load_rows(path, "curves", Curve, "run 'ibq-scale experiments run stability' again")


def collect(runs: Path) -> list[Curve]:
    """The bench's finished curves under `runs`, in the order of the table, of seeds with all scales."""
    found: list[Curve] = []
    for variant in VARIANTS:
        for path in sorted((runs / FOLDER).glob(f"{variant.name}-[0-9]*/*.json")):
            found += load(path)
    order = [v.name for v in VARIANTS]
    return sorted(_whole(found), key=lambda c: (c.codes, order.index(c.name), c.scale or 0.0, c.seed))


def _whole(curves: Sequence[Curve]) -> Iterator[Curve]:
    """Without seeds lacking a scale: their means would be over other scales than the rest."""
    scales = {c.scale for c in curves if c.scale is not None}
    for curve in curves:
        same = {c.scale for c in curves if (c.name, c.codes, c.seed) == (curve.name, curve.codes, curve.seed)}
        if same in (scales, {None}):
            yield curve


def _kind(variant: Variant) -> str:
    kinds = [word.split("=")[1] for word in variant.overrides if word.startswith("quantizer.kind=")]
    return kinds[-1] if kinds else "ibq"


def _shape(variant: Variant, codes: int) -> list[str]:
    """The dimensions of kinds with a codebook of a given form: bits of LFQ, levels of FSQ."""
    kind = _kind(variant)
    if kind not in ("lfq", "fsq"):
        return []
    bits = codes.bit_length() - 1
    if codes != 2**bits:
        raise UserError(f"{kind} needs a power of two here, got {codes} codes")
    if kind == "lfq":
        return [f"quantizer.dim={bits}"]
    numbers = -(-bits // 3)
    levels = [2 ** (bits // numbers + (i < bits % numbers)) for i in range(numbers)]
    return [f"quantizer.dim={numbers}", f"quantizer.levels={levels}".replace(" ", "")]
