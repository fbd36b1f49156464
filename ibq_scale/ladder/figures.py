"""The figures of a fit: loss against size, residuals, and the best size of a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ibq_scale.console import short
from ibq_scale.ladder.fit import Fit
from ibq_scale.ladder.results import Result
from ibq_scale.report.svg import Axis, Panel, Series, figure
from ibq_scale.scaling.laws import Law
from ibq_scale.scaling.optimum import Cost, compute_optimal

CURVE = 40
LAW, BEYOND_SLOT = 0, 1
# Rungs with FLOPs closer than this factor share a budget. Whole steps seldom fill a budget.
SAME_BUDGET = 1.1
# Room at both ends of an axis, a factor.
ROOM = 1.3


def draw_fit(fit: Fit) -> str:
    """One SVG document. Without a joint law it has dots only."""
    law = fit.joint if isinstance(fit.joint, Law) else None
    panels = [_losses(fit, law)]
    if law is not None and fit.cost is not None:
        panels.append(_residuals(fit, law))
        if compute_optimal(law, fit.cost, fit.cost.high).told:
            panels.append(_best(fit, law, fit.cost))
    measured = "held out" if all(r.held_out for r in fit.results) else "of training"
    return figure(f"Loss by size and data, K = {fit.codebook:,}", f"nats a code, {measured}; dots: rungs", panels)


def budgets(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """Rungs with a common budget: in tokens if several sizes saw the same number, else in FLOPs."""
    by_tokens = _grouped(results, lambda r: float(r.tokens))
    if any(len({r.parameters for r in group}) > 1 for group in by_tokens):
        return [(f"{short(group[0].tokens, 3)} tokens", group) for group in by_tokens]
    return [(f"{group[0].flops:.2g} FLOPs", group) for group in _grouped(results, lambda r: r.flops)]


def _grouped(results: Sequence[Result], key: Callable[[Result], float]) -> list[list[Result]]:
    groups: list[list[Result]] = []
    for result in sorted(results, key=key):
        if groups and key(result) < SAME_BUDGET * key(groups[-1][0]):
            groups[-1].append(result)
        else:
            groups.append([result])
    return groups


def _losses(fit: Fit, law: Law | None) -> Panel:
    axis = _axis("parameters", [r.parameters for r in fit.results])
    series = []
    values = [r.loss for r in fit.results]
    for slot, (label, group) in enumerate(budgets(fit.results)):
        dots = [(float(r.parameters), r.loss) for r in group]
        line: list[tuple[float, float]] = []
        if law is not None:
            sizes = np.geomspace(min(r.parameters for r in group), max(r.parameters for r in group), CURVE).tolist()
            line = [(n, law.predict({"N": n, "D": d}).loss.value) for n, d in _along(fit, group, sizes)]
            values += [y for _, y in line]
        series.append(Series(label, slot, line=line, dots=dots))
    return Panel("Loss by size", axis, _plain_axis("", values, 3), series, right=120)


def _along(fit: Fit, group: Sequence[Result], sizes: Sequence[float]) -> list[tuple[float, float]]:
    """(N, D) over a budget: the same tokens, or the same FLOPs."""
    if len({r.tokens for r in group}) == 1:
        return [(n, float(group[0].tokens)) for n in sizes]
    assert fit.cost is not None
    flops = float(np.exp(np.mean([math.log(r.flops) for r in group])))
    return [(n, flops / math.exp(fit.cost.log_c + fit.cost.gamma * math.log(n))) for n in sizes]


def _residuals(fit: Fit, law: Law) -> Panel:
    percent = [100 * float(value) for value in law.residuals()]
    axis = _axis("FLOPs", [r.flops for r in fit.results])
    zero = Series("", LAW, line=[(axis.low, 0.0), (axis.high, 0.0)], dashed=True)
    dots = Series("", LAW, dots=[(r.flops, y) for r, y in zip(fit.results, percent, strict=True)])
    return Panel("Measured over fitted, %", axis, _plain_axis("", [*percent, 0.0], 2), [zero, dots], right=30)


def _best(fit: Fit, law: Law, cost: Cost) -> Panel:
    """Solid within the fitted FLOPs, dashed beyond."""
    most = max([cost.high, *(optimum.flops for optimum in fit.optima if optimum.told)])
    spans = [(cost.low, cost.high, False)] + ([(cost.high, most, True)] if most > cost.high else [])
    series, values = [], []
    for low, high, dashed in spans:
        found = [compute_optimal(law, cost, float(c)) for c in np.geomspace(low, high, CURVE // 2)]
        band = [(o.flops, o.parameters.low, o.parameters.high) for o in found]
        line = [(o.flops, o.parameters.value) for o in found]
        label = "extrapolated" if dashed else ""
        series.append(Series(label, BEYOND_SLOT if dashed else LAW, line=line, band=band, dashed=dashed))
        values += [v for _, a, b in band for v in (a, b)]
    return Panel("Best parameters of a budget", _axis("FLOPs", [cost.low, most]), _axis("", values), series, right=96)


def _axis(label: str, values: Sequence[float]) -> Axis:
    """Logarithmic, with ticks at 1, 2 and 5 of each decade, or at decades only if these are many."""
    low, high = min(values) / ROOM, max(values) * ROOM
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    every = max(1, len(decades) // 6)
    places = [s * 10.0**d for d in decades if d % every == 0 for s in steps]
    ticks = [(p, f"{p:.2g}" if p >= 1e15 else short(p, 3)) for p in places if low <= p <= high]
    return Axis(label, low, high, ticks, log=True)


def _plain_axis(label: str, values: Sequence[float], digits: int) -> Axis:
    least, most = min(values), max(values)
    room = max(0.08 * (most - least), 1e-6)
    low, high = least - room, most + room
    places = np.linspace(low, high, 6)
    return Axis(label, low, high, [(float(p), f"{p:.{digits}f}") for p in places])
