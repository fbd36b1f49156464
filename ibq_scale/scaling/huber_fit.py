"""Fits sums of powers to losses by Huber's loss: many problems in one batch, each from several starts (see `laws`).

The objective is that of Hoffmann et al. (arXiv 2203.15556, appendix D.2, approach 3): Huber's loss, δ = 1e-3, of the
log of the loss, with the terms of the law as exponentials, hence positive:

    log L = logsumexp(e, a_1 − α_1 x_1, a_2 − α_2 x_2),   x = log of the variable over its geometric mean

They run L-BFGS on one problem after the other. Here all problems take Gauss-Newton steps in one batch, with Huber's
weights and adaptive damping (Levenberg-Marquardt). Centring x keeps e, a and α from being degenerate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

DELTA = 1e-3
ITERATIONS = 300
# The iteration ends at a smaller relative change of the objective.
SAME = 1e-9
# Bounds of a term, relative to the lowest loss, and of an exponent.
LEAST_TERM, LEAST_EXPONENT, MOST_EXPONENT = 1e-3, 0.01, 4.0
# Starting points: E relative to the lowest loss, and exponents.
START_SHARES, START_EXPONENTS = (0.3, 0.7, 0.95), (0.1, 0.3, 0.8)


@dataclass(frozen=True)
class Bounds:
    """Bounds of the parameters (M,): e, then (a, α) of each variable."""

    low_M: Array
    high_M: Array

    @staticmethod
    def of(loss_R: Array, variables: int) -> Bounds:
        """Bounds for losses (R,) of `variables` variables."""
        least, most = np.log(LEAST_TERM * loss_R.min()), np.log(1.1 * loss_R.max())
        return Bounds(
            np.array([least, *[least, LEAST_EXPONENT] * variables]),
            np.array([most, *[most, MOST_EXPONENT] * variables]),
        )

    def touched(self, theta_PM: Array) -> npt.NDArray[np.bool_]:
        """True for parameters (P, M) at a bound."""
        room = 1e-3 * (self.high_M - self.low_M)
        touched: npt.NDArray[np.bool_] = (theta_PM <= self.low_M + room) | (theta_PM >= self.high_M - room)
        return touched


def log_loss(theta_PM: Array, x_VR: Array) -> Array:
    """log L (P, R) of laws at points (V, R)."""
    return _terms(theta_PM, x_VR)[1]


def starts(loss_R: Array, variables: int) -> Array:
    """Starting parameters (S, M) over the possible range. The terms share the rest of the middle loss beside E."""
    middle, least = np.exp(np.log(loss_R).mean()), loss_R.min()
    grid = [np.array(START_SHARES)] + [np.array(START_EXPONENTS)] * variables
    found = []
    for share, *exponents in np.stack(np.meshgrid(*grid), axis=-1).reshape(-1, 1 + variables):
        term = np.log(max(middle - share * least, LEAST_TERM * least) / variables)
        found.append([np.log(share * least), *[v for exponent in exponents for v in (term, exponent)]])
    return np.array(found)


def objective(theta_PM: Array, x_VR: Array, log_loss_PR: Array) -> Array:
    """Sum of Huber's losses (P,)."""
    return _huber(log_loss(theta_PM, x_VR) - log_loss_PR)


def minimise(start_PM: Array, x_VR: Array, log_loss_PR: Array, bounds: Bounds) -> tuple[Array, Array]:
    """Parameters (P, M) and objectives (P,) at a minimum, each problem from its own start."""
    theta = np.clip(start_PM, bounds.low_M, bounds.high_M)
    value = objective(theta, x_VR, log_loss_PR)
    damping = np.full(len(theta), 1e-2)
    active = np.arange(len(theta))
    for _ in range(ITERATIONS):
        y = log_loss_PR[active]
        proposed = _step(theta[active], x_VR, y, damping[active], bounds)
        new = objective(proposed, x_VR, y)
        better = new < value[active]
        gained = value[active] - new
        done = (better & (gained <= SAME * value[active])) | (~better & (damping[active] > 1e8))
        theta[active[better]], value[active[better]] = proposed[better], new[better]
        damping[active] = np.clip(damping[active] * np.where(better, 0.2, 5.0), 1e-9, 1e9)
        active = active[~done]
        if not len(active):
            break
    return theta, value


def best_of(start_SM: Array, x_VR: Array, log_loss_PR: Array, bounds: Bounds) -> tuple[Array, Array]:
    """The best minimum of each problem, (P, M) and (P,), over all starts (S, M)."""
    problems, count = len(log_loss_PR), len(start_SM)
    theta, value = minimise(np.tile(start_SM, (problems, 1)), x_VR, np.repeat(log_loss_PR, count, axis=0), bounds)
    value_PS = value.reshape(problems, count)
    best_P = value_PS.argmin(axis=1)
    rows_P = np.arange(problems)
    return theta.reshape(problems, count, -1)[rows_P, best_P], value_PS[rows_P, best_P]


def _terms(theta_PM: Array, x_VR: Array) -> tuple[Array, Array]:
    """Each term's share of the loss (P, V + 1, R), and the log of the loss (P, R)."""
    points = x_VR.shape[1]
    constant = np.repeat(theta_PM[:, :1, None], points, axis=2)
    powers = theta_PM[:, 1::2, None] - theta_PM[:, 2::2, None] * x_VR
    terms = np.concatenate([constant, powers], axis=1)
    most = terms.max(axis=1, keepdims=True)
    weights = np.exp(terms - most)
    total = weights.sum(axis=1, keepdims=True)
    return weights / total, (most + np.log(total))[:, 0]


def _huber(residual_PR: Array) -> Array:
    size = np.abs(residual_PR)
    each: Array = np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))
    total: Array = each.sum(axis=1)
    return total


def _step(theta_PM: Array, x_VR: Array, log_loss_PR: Array, damping_P: Array, bounds: Bounds) -> Array:
    share_PTR, predicted_PR = _terms(theta_PM, x_VR)
    residual_PR = predicted_PR - log_loss_PR
    weight_PR = np.minimum(1.0, DELTA / np.maximum(np.abs(residual_PR), 1e-300))
    jacobian_PMR = np.empty((len(theta_PM), theta_PM.shape[1], x_VR.shape[1]))
    jacobian_PMR[:, 0] = share_PTR[:, 0]
    jacobian_PMR[:, 1::2] = share_PTR[:, 1:]
    jacobian_PMR[:, 2::2] = -share_PTR[:, 1:] * x_VR
    gradient_PM = np.einsum("pmr,pr->pm", jacobian_PMR, weight_PR * residual_PR)
    normal_PMM = np.einsum("pmr,pnr->pmn", jacobian_PMR * weight_PR[:, None], jacobian_PMR)
    # Parameters at a bound with a step beyond it are fixed, and do not stop the others.
    fixed_PM = ((theta_PM <= bounds.low_M) & (gradient_PM > 0)) | ((theta_PM >= bounds.high_M) & (gradient_PM < 0))
    gradient_PM[fixed_PM] = 0.0
    free = (~fixed_PM).astype(np.float64)
    normal_PMM *= free[:, :, None] * free[:, None, :]
    diagonal_PM = np.einsum("pmm->pm", normal_PMM)
    extra_PM = damping_P[:, None] * np.maximum(diagonal_PM, 1e-12) + 1e-15 + fixed_PM
    normal_PMM += extra_PM[:, :, None] * np.eye(theta_PM.shape[1])
    move_PM = np.linalg.solve(normal_PMM, gradient_PM[:, :, None])[:, :, 0]
    stepped: Array = np.clip(theta_PM - move_PM, bounds.low_M, bounds.high_M)
    return stepped
