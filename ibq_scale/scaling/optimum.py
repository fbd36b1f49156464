"""The compute-optimal parameters, tokens and loss of a FLOP budget, by a law L(N, D).

FLOPs of a training are c·N^γ·D, with c and γ fitted to the ladder's runs. The usual 6·N·D omits attention, and counts
AdaLN per token although it runs once an image. With D = C / (c·N^γ), the law's derivative by log N is zero at (Hoffmann
et al., arXiv 2203.15556, equation 4, have γ = 1 and c = 6)

    N* = (α·A / (γ·β·B))^(1 / (α + γ·β)) · (C / c)^(β / (α + γ·β)),   D* = C / (c·N*^γ)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ibq_scale.errors import UserError
from ibq_scale.scaling.huber_fit import log_loss
from ibq_scale.scaling.laws import Interval, Law, outside

# An interval with a larger factor between its ends determines no size.
MOST_SPREAD = 10.0
# Bounds of log N, for replicas without an optimum.
FARTHEST = 100.0


@dataclass(frozen=True)
class Cost:
    """FLOPs of a training, exp(`log_c`)·N^`gamma`·D. `error`: the largest relative deviation. `low`, `high`: range of
    the fitted FLOPs.
    """

    log_c: float
    gamma: float
    error: float
    low: float
    high: float

    @staticmethod
    def of(parameters: Sequence[float], tokens: Sequence[float], flops: Sequence[float]) -> Cost:
        """Least-squares fit of logs. UserError for fewer than two sizes."""
        if len(set(parameters)) < 2:
            raise UserError("the cost of a size needs at least two sizes")
        x_R, y_R = np.log(parameters), np.log(flops) - np.log(tokens)
        gamma, log_c = np.polyfit(x_R, y_R, 1)
        error = float(np.abs(np.exp(log_c + gamma * x_R - y_R) - 1.0).max())
        return Cost(float(log_c), float(gamma), error, float(min(flops)), float(max(flops)))


@dataclass(frozen=True)
class Optimum:
    """The optimum of a budget. `loss` in nats a code."""

    flops: float
    parameters: Interval
    tokens: Interval
    loss: Interval
    warnings: tuple[str, ...]

    @property
    def told(self) -> bool:
        """Whether the rungs determine a size within a factor of `MOST_SPREAD`."""
        return self.parameters.high <= MOST_SPREAD * self.parameters.low


def compute_optimal(law: Law, cost: Cost, flops: float) -> Optimum:
    """The optimum of a law L(N, D) at a budget of FLOPs."""
    assert law.variables == ("N", "D"), "a budget is shared between size and data"
    log_a, alpha = law.powers("N")
    log_b, beta = law.powers("D")
    room = np.log(flops) - cost.log_c
    ratio = np.log(alpha) + log_a - np.log(cost.gamma * beta) - log_b
    log_n = np.clip((ratio + beta * room) / (alpha + cost.gamma * beta), -FARTHEST, FARTHEST)
    log_d = room - cost.gamma * log_n
    theta_PM = np.concatenate([law.theta_M[None], law.replicas_PM])
    centre_n, centre_d = law.centre_V
    # Each replica at its own optimum.
    losses = [
        float(np.exp(log_loss(theta_M[None], np.array([[n - centre_n], [d - centre_d]])))[0, 0])
        for theta_M, n, d in zip(theta_PM, log_n, log_d, strict=True)
    ]
    parameters, tokens = (Interval.of(np.exp(v[0]), np.exp(v[1:])) for v in (log_n, log_d))
    warnings = [line] if (line := outside("FLOPs", flops, cost.low, cost.high)) else []
    warnings += law.beyond({"N": parameters.value, "D": tokens.value})
    optimum = Optimum(flops, parameters, tokens, Interval.of(losses[0], np.array(losses[1:])), tuple(warnings))
    if optimum.told:
        return optimum
    line = f"OPEN: the best size's interval spans more than a factor of {MOST_SPREAD:.0f}: these rungs do not tell it"
    return replace(optimum, warnings=(*warnings, line))
