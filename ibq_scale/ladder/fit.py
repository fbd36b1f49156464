"""Fits laws to a ladder's results, and predicts larger budgets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ibq_scale.errors import UserError
from ibq_scale.ladder.results import Result
from ibq_scale.scaling.laws import MEANING, REPLICAS, Law, fit_law
from ibq_scale.scaling.optimum import Cost, Optimum, compute_optimal

FIT = "fit.json"
# Default budgets of a report, in parts of the largest rung's FLOPs.
BUDGETS = (1.0, 10.0, 100.0)
# Up to so many epochs, repeated data is worth about as much as new data (arXiv 2305.16264).
EPOCHS = 4.0


@dataclass(frozen=True)
class NotFitted:
    """A law without enough rungs, and the reason."""

    name: str
    why: str


@dataclass(frozen=True)
class Fit:
    """The fit for one codebook. `joint` is L(N, D). `singles` are L(N) at a number of tokens, and L(D) of a size."""

    codebook: int
    results: tuple[Result, ...]
    joint: Law | NotFitted
    singles: dict[str, Law | NotFitted]
    cost: Cost | None
    optima: tuple[Optimum, ...]
    warnings: tuple[str, ...]

    @property
    def laws(self) -> dict[str, Law]:
        """The fitted laws, by a name with their fixed variable."""
        named = {f"L(N, D), K = {self.codebook:,}": self.joint, **self.singles}
        return {name: law for name, law in named.items() if isinstance(law, Law)}

    @property
    def not_fitted(self) -> list[NotFitted]:
        return [law for law in (self.joint, *self.singles.values()) if isinstance(law, NotFitted)]


def fit_ladder(
    results: Sequence[Result], *, flops: Sequence[float] = (), replicas: int = REPLICAS, seed: int = 0
) -> list[Fit]:
    """One fit per codebook, since losses over different codebooks do not compare.

    `flops`: budgets for predictions. Default: the largest rung's, 10 and 100 times as much.
    """
    codebooks = sorted({result.codebook for result in results})
    return [_fit([r for r in results if r.codebook == k], k, flops, replicas, seed) for k in codebooks]


def document(fits: Sequence[Fit]) -> list[dict[str, Any]]:
    """As JSON: every number of the report."""
    return [
        {
            "codebook": fit.codebook,
            "laws": {name: _law(law) for name, law in fit.laws.items()},
            "not_fitted": {law.name: law.why for law in fit.not_fitted},
            "optima": [asdict(optimum) for optimum in fit.optima],
            "warnings": list(fit.warnings),
        }
        for fit in fits
    ]


def _fit(results: Sequence[Result], codebook: int, flops: Sequence[float], replicas: int, seed: int) -> Fit:
    def law(name: str, rungs: Sequence[Result], *variables: str) -> Law | NotFitted:
        points = {v: [_VALUES[v](r) for r in rungs] for v in variables}
        try:
            return fit_law(points, [r.loss for r in rungs], replicas=replicas, seed=seed)
        except UserError as e:
            return NotFitted(name, str(e))

    joint = law("L(N, D)", results, "N", "D")
    singles: dict[str, Law | NotFitted] = {}
    for free, held in (("N", "D"), ("D", "N")):
        for value, rungs in _alike(results, held, free):
            name = f"L({free}) at {value:,.0f} {MEANING[held]}, K = {codebook:,}"
            singles[name] = law(name, rungs, free)
    cost: Cost | None = None
    optima: tuple[Optimum, ...] = ()
    if isinstance(joint, Law):
        cost = Cost.of([r.parameters for r in results], [r.tokens for r in results], [r.flops for r in results])
        budgets = list(flops) or [share * cost.high for share in BUDGETS]
        optima = tuple(compute_optimal(joint, cost, budget) for budget in budgets)
    return Fit(codebook, tuple(results), joint, singles, cost, optima, _of_results(results))


_VALUES: dict[str, Callable[[Result], float]] = {"N": lambda r: float(r.parameters), "D": lambda r: float(r.tokens)}


def _alike(results: Sequence[Result], held: str, free: str) -> list[tuple[float, list[Result]]]:
    """Rungs with equal values of the one variable, and at least two of the other."""
    value, other = _VALUES[held], _VALUES[free]
    groups = [(v, [r for r in results if value(r) == v]) for v in sorted({value(r) for r in results})]
    return [(v, group) for v, group in groups if len({other(r) for r in group}) > 1]


def _of_results(results: Sequence[Result]) -> tuple[str, ...]:
    lines = []
    trained = [r.name for r in results if not r.held_out]
    if trained:
        lines.append(
            f"TRAINING LOSS: {len(trained)} of {len(results)} rungs have no held-out loss; their loss is of the "
            "end of training, with dropout"
        )
    epochs = [r.epochs for r in results if r.epochs is not None]
    if epochs and max(epochs) > EPOCHS:
        lines.append(
            f"REPEATED DATA: up to {max(epochs):.3g} passes; beyond about {EPOCHS:.0f}, repeated tokens are worth "
            "less than new ones, and the law counts both alike"
        )
    return tuple(lines)


def _law(law: Law) -> dict[str, Any]:
    held_out = law.held_out
    return {
        "formula": law.formula,
        "parameters": law.parameters(),
        "noise": law.noise,
        "residuals": law.residuals().tolist(),
        "held_out": held_out and asdict(held_out) | {"error": held_out.error},
        "warnings": list(law.warnings),
    }


def save(values: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Writes a document as ``fit.json``."""
    path = folder / FIT
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
