"""Scaling laws with intervals: L(N) = E + A·N^−α, L(D) = E + B·D^−β, L(N, D) = E + A·N^−α + B·D^−β.

The fit follows Hoffmann et al. (arXiv 2203.15556, approach 3, see `huber_fit`). Intervals come from a bootstrap: losses
are drawn around the fitted law and fitted again. The noise is normal instead of resampled residuals: a fit of nearly
absolute values passes through as many points as it has parameters, and those residuals are zero. The standard deviation
is that of the residuals over n − p degrees of freedom, widened by the ratio of a t interval to a normal one
(Hesterberg, The American Statistician 69, 2015), so few rungs give wide intervals.

Intervals do not cover a wrong form of the law. Every value outside of the fitted range therefore has a warning with its
distance from the range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from ibq_scale.errors import UserError
from ibq_scale.scaling.huber_fit import Array, Bounds, best_of, log_loss, starts

LEVEL = 0.95
REPLICAS = 1000
# Fewer values of a variable cannot separate a constant from a power.
LEAST_VALUES = 3
# Above this correlation two parameters are degenerate.
BOUND_TOGETHER = 0.95
# Above this correlation of sizes and data they are one variable.
ONE_VARIABLE = 0.999
# Share of replicas at a bound that raises a warning.
OFTEN = 0.05
# Share of the values' range. Less is rounding.
BEYOND = 1.001
# A replica starts from the law itself and from every so many of the starting points.
EVERY_START = 13

NAMES = {"N": ("A", "alpha"), "D": ("B", "beta")}
MEANING = {"N": "parameters", "D": "tokens"}


class Interval(NamedTuple):
    """A value with its 95 % interval, `low` to `high`."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(value: float, replicas_P: Array) -> Interval:
        """The interval from percentiles of the replicas."""
        low, high = np.quantile(replicas_P, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(value), float(low), float(high))

    def holds(self, value: float) -> bool:
        """Whether the interval contains `value`."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Prediction:
    """The law's loss at a point (nats a code), without the noise of a single run, with warnings."""

    loss: Interval
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class HeldOut:
    """The largest rung, predicted by a law fitted to all others."""

    point: dict[str, float]
    measured: float
    predicted: Interval

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted.value / self.measured - 1.0


@dataclass(frozen=True)
class Law:
    """A fitted law. `theta_M`, `replicas_PM`: see `huber_fit`, about `centre` (log of each variable's geometric mean).

    `points_VR`, `losses_R`: the fitted data. `noise`: standard deviation of log L around the law.
    """

    variables: tuple[str, ...]
    points_VR: Array
    losses_R: Array
    centre_V: Array
    theta_M: Array
    replicas_PM: Array
    noise: float
    warnings: tuple[str, ...]
    held_out: HeldOut | None

    @property
    def name(self) -> str:
        return f"L({', '.join(self.variables)})"

    @property
    def formula(self) -> str:
        """The formula with its numbers."""
        values = {name: interval.value for name, interval in self.parameters().items()}
        powers = [f"{values[NAMES[v][0]]:.4g}·{v}^−{values[NAMES[v][1]]:.3g}" for v in self.variables]
        return f"{self.name} = " + " + ".join([f"{values['E']:.4g}", *powers])

    def parameters(self) -> dict[str, Interval]:
        """E, and A, alpha or B, beta."""
        found = {"E": Interval.of(math.exp(self.theta_M[0]), np.exp(self.replicas_PM[:, 0]))}
        for i, variable in enumerate(self.variables):
            factor, exponent = NAMES[variable]
            value, replicas_P = self._log_factors(i)
            found[factor] = Interval.of(math.exp(value), np.exp(replicas_P))
            found[exponent] = Interval.of(self.theta_M[2 * i + 2], self.replicas_PM[:, 2 * i + 2])
        return found

    def residuals(self) -> Array:
        """Measured over fitted, less 1 (R,)."""
        fitted_R = np.exp(log_loss(self.theta_M[None], np.log(self.points_VR) - self.centre_V[:, None])[0])
        left: Array = self.losses_R / fitted_R - 1.0
        return left

    def predict(self, point: Mapping[str, float]) -> Prediction:
        """The loss at a value of each variable."""
        x_V1 = np.log([[point[v]] for v in self.variables]) - self.centre_V[:, None]
        value = float(np.exp(log_loss(self.theta_M[None], x_V1))[0, 0])
        replicas_P = np.exp(log_loss(self.replicas_PM, x_V1))[:, 0]
        return Prediction(Interval.of(value, replicas_P), self.beyond(point))

    def beyond(self, point: Mapping[str, float]) -> tuple[str, ...]:
        """A warning for each variable outside of the fitted range."""
        lines = []
        for variable, values_R in zip(self.variables, self.points_VR, strict=True):
            line = outside(MEANING[variable], point[variable], values_R.min(), values_R.max())
            lines += [line] if line else []
        return tuple(lines)

    def powers(self, variable: str) -> tuple[Array, Array]:
        """log factor and exponent of a variable's term, each (1 + P,): the law's, then the replicas'."""
        i = self.variables.index(variable)
        value, replicas_P = self._log_factors(i)
        exponents = np.concatenate([self.theta_M[None, 2 * i + 2], self.replicas_PM[:, 2 * i + 2]])
        return np.concatenate([[value], replicas_P]), exponents

    def _log_factors(self, i: int) -> tuple[float, Array]:
        """log A of A·N^−α, of the law and of each replica."""
        value = self.theta_M[2 * i + 1] + self.theta_M[2 * i + 2] * self.centre_V[i]
        return float(value), self.replicas_PM[:, 2 * i + 1] + self.replicas_PM[:, 2 * i + 2] * self.centre_V[i]


def outside(what: str, value: float, low: float, high: float) -> str | None:
    """A warning if `value` is outside of the fitted range."""
    factor = max(value / high, low / value)
    if factor <= BEYOND:
        return None
    where = "above the most" if value > high else "below the least"
    bound = high if value > high else low
    return f"EXTRAPOLATED: {value:.3g} {what} are {factor:.3g} times {where} that was fitted ({bound:.3g})"


def fit_law(
    points: Mapping[str, Sequence[float]],
    losses: Sequence[float],
    *,
    replicas: int = REPLICAS,
    seed: int = 0,
    hold_out: bool = True,
) -> Law:
    """Fits the law of the variables in `points` (``N`` parameters, ``D`` tokens, or both) to losses in nats a code.

    With `hold_out` a second fit without the largest rung predicts it. UserError for losses that are not positive
    numbers, and for rungs that do not determine the law's parameters.
    """
    variables = tuple(v for v in NAMES if v in points)
    points_VR = np.array([points[v] for v in variables], dtype=np.float64)
    losses_R = np.array(losses, dtype=np.float64)
    _check(variables, points_VR, losses_R)
    centre_V = np.log(points_VR).mean(axis=1)
    x_VR = np.log(points_VR) - centre_V[:, None]
    bounds, start_SM = Bounds.of(losses_R, len(variables)), starts(losses_R, len(variables))
    theta_M = best_of(start_SM, x_VR, np.log(losses_R)[None], bounds)[0][0]
    fitted_R = log_loss(theta_M[None], x_VR)[0]
    freedom = len(losses_R) - len(theta_M)
    noise = math.sqrt(float(((fitted_R - np.log(losses_R)) ** 2).sum()) / freedom)
    wide = noise * t_quantile(freedom) / NormalDist().inv_cdf((1 + LEVEL) / 2)
    drawn_PR = fitted_R + np.random.default_rng(seed).normal(0.0, wide, (replicas, len(losses_R)))
    again_SM = np.concatenate([theta_M[None], start_SM[EVERY_START // 2 :: EVERY_START]])
    replicas_PM = best_of(again_SM, x_VR, drawn_PR, bounds)[0]
    law = Law(variables, points_VR, losses_R, centre_V, theta_M, replicas_PM, noise, (), None)
    held_out = _hold_out(points, law, replicas, seed) if hold_out else None
    warnings = _warnings(law, bounds)
    return Law(variables, points_VR, losses_R, centre_V, theta_M, replicas_PM, noise, warnings, held_out)


def t_quantile(freedom: int) -> float:
    """Student's t at (1 + LEVEL) / 2: exact for 1 and 2, else by Abramowitz and Stegun's 26.7.5 (within 1 %)."""
    p = (1 + LEVEL) / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z, n = NormalDist().inv_cdf(p), freedom
    terms = (
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
    )
    return z + sum(terms)


def _check(variables: Sequence[str], points_VR: Array, losses_R: Array) -> None:
    if not (np.isfinite(losses_R).all() and (losses_R > 0).all() and (points_VR > 0).all()):
        raise UserError("losses, parameters and tokens must be positive numbers: a run that has diverged is no rung")
    count = 1 + 2 * len(variables)
    name = f"L({', '.join(variables)})"
    if len(losses_R) <= count:
        raise UserError(f"{name} has {count} parameters and needs more rungs than that; there are {len(losses_R)}")
    for variable, values_R in zip(variables, points_VR, strict=True):
        distinct = len(np.unique(values_R))
        if distinct < LEAST_VALUES:
            raise UserError(
                f"{name}: {distinct} values of {MEANING[variable]} cannot tell E from a power of {variable}: take at "
                f"least {LEAST_VALUES}"
            )
    if len(variables) == 2 and abs(np.corrcoef(np.log(points_VR))[0, 1]) > ONE_VARIABLE:
        raise UserError(
            f"{name}: parameters and tokens are proportional in these rungs, so their terms cannot be separated"
        )


def _hold_out(points: Mapping[str, Sequence[float]], law: Law, replicas: int, seed: int) -> HeldOut | None:
    largest = int(np.log(law.points_VR).sum(axis=0).argmax())
    kept = [i for i in range(len(law.losses_R)) if i != largest]
    try:
        rest = fit_law(
            {v: [points[v][i] for i in kept] for v in law.variables},
            [float(law.losses_R[i]) for i in kept],
            replicas=replicas,
            seed=seed,
            hold_out=False,
        )
    except UserError:
        return None
    point = {v: float(points[v][largest]) for v in law.variables}
    return HeldOut(point, float(law.losses_R[largest]), rest.predict(point).loss)


def _warnings(law: Law, bounds: Bounds) -> tuple[str, ...]:
    lines = []
    rungs, count = len(law.losses_R), len(law.theta_M)
    if rungs < 2 * count:
        lines.append(f"FEW RUNGS: {rungs} for {count} parameters; intervals rest on {rungs - count} degrees of freedom")
    labels = ["E", *(name for v in law.variables for name in NAMES[v])]
    at_bound_M = bounds.touched(law.theta_M[None])[0]
    share_M = bounds.touched(law.replicas_PM).mean(axis=0)
    for label, at_bound, share in zip(labels, at_bound_M, share_M, strict=True):
        if at_bound:
            lines.append(
                f"AT A BOUND: {label} of the fit is at the end of what is looked at: these rungs do not tell it"
            )
        elif share > OFTEN:
            lines.append(f"NOT RESOLVED: {label} ends at a bound in {100 * share:.0f} % of the replicas")
    correlation_MM = _correlation(law.replicas_PM)
    for i, variable in enumerate(law.variables):
        together = abs(correlation_MM[0, 2 * i + 2])
        if together > BOUND_TOGETHER:
            lines.append(
                f"BOUND TOGETHER: E and {NAMES[variable][1]} (correlation {together:.3f} over the replicas): the law "
                f"is known within its range, its parts are not"
            )
    return tuple(lines)


def _correlation(replicas_PM: Array) -> Array:
    spread_M = replicas_PM.std(axis=0)
    centred_PM = (replicas_PM - replicas_PM.mean(axis=0)) / np.where(spread_M > 0, spread_M, 1.0)
    product: Array = centred_PM.T @ centred_PM / len(replicas_PM)
    return product
