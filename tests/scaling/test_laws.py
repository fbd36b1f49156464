"""Known laws are found again, what is not known is wide or refused, and nothing beyond the range comes unmarked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ibq_scale.errors import UserError
from ibq_scale.scaling.huber_fit import DELTA, Bounds, best_of, log_loss, minimise, objective, starts
from ibq_scale.scaling.laws import Law, fit_law, t_quantile
from ibq_scale.scaling.optimum import Cost, compute_optimal

# Hoffmann et al., arXiv 2203.15556, approach 3.
E, A, ALPHA, B, BETA = 1.69, 406.4, 0.34, 410.7, 0.28
TRUTH = {"E": E, "A": A, "alpha": ALPHA, "B": B, "beta": BETA}
DRAWS, ENOUGH = 100, 0.90

SIZES = np.array([1e7, 3e7, 1e8, 3e8, 1e9])
DATA = np.array([3e8, 1e9, 3e9, 1e10])
GRID = tuple(values.ravel() for values in np.meshgrid(SIZES, DATA))


def _truth(variables: str, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return E + ("N" in variables) * A / n**ALPHA + ("D" in variables) * B / d**BETA


def _points(variables: str, n: np.ndarray, d: np.ndarray) -> dict[str, list[float]]:
    return {v: list(values) for v, values in (("N", n), ("D", d)) if v in variables}


def _noisy(variables: str, n: np.ndarray, d: np.ndarray, noise: float, seed: int, **options: object) -> Law:
    # Another stream than the bootstrap of the same seed.
    drawn = np.random.default_rng((seed, 1)).normal(0.0, noise, len(n))
    losses = list(_truth(variables, n, d) * np.exp(drawn))
    return fit_law(_points(variables, n, d), losses, seed=seed, **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("variables", "noise"), [("N", 0.003), ("D", 0.003), ("ND", 0.005)])
def test_known_laws_lie_within_their_intervals(variables: str, noise: float) -> None:
    """Each parameter, the loss at ten times the range, and the best size of ten times the budget."""
    n, d = GRID if variables == "ND" else (np.geomspace(1e7, 3e9, 6), np.geomspace(3e8, 1e11, 6))
    far = {"N": 10 * n.max(), "D": 10 * d.max()}
    flops = 6 * n * d
    best = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (10 * flops.max() / 6) ** (BETA / (ALPHA + BETA))
    hits: dict[str, list[bool]] = {}
    for seed in range(DRAWS):
        law = _noisy(variables, n, d, noise, seed, replicas=200, hold_out=False)
        found = {name: interval.holds(TRUTH[name]) for name, interval in law.parameters().items()}
        found["loss beyond"] = law.predict(far).loss.holds(float(_truth(variables, far["N"], far["D"])))
        if variables == "ND":
            optimum = compute_optimal(law, Cost.of(list(n), list(d), list(flops)), 10 * flops.max())
            found["best size"] = optimum.parameters.holds(float(best))
        for name, hit in found.items():
            hits.setdefault(name, []).append(hit)
    shares = {name: float(np.mean(values)) for name, values in hits.items()}
    assert min(shares.values()) >= ENOUGH, shares


def test_without_noise_the_law_is_exact() -> None:
    law = fit_law(_points("ND", *GRID), list(_truth("ND", *GRID)), replicas=20)
    for name, interval in law.parameters().items():
        assert interval.value == pytest.approx(TRUTH[name], rel=1e-3), name
    assert np.abs(law.residuals()).max() < 1e-6
    assert law.held_out is not None
    assert abs(law.held_out.error) < 1e-5
    assert law.predict({"N": 1e8, "D": 1e9}).warnings == ()


@pytest.mark.slow
def test_the_minimum_is_that_of_lbfgs() -> None:
    """From every start, in one batch, against torch's L-BFGS on one start after the other."""
    n, d = GRID
    x_VR = np.log(np.stack([n, d]))
    x_VR -= x_VR.mean(axis=1, keepdims=True)
    losses = _truth("ND", n, d) * np.exp(np.random.default_rng(3).normal(0.0, 0.01, len(n)))
    start_SM, bounds = starts(losses, 2), Bounds.of(losses, 2)
    ours = best_of(start_SM, x_VR, np.log(losses)[None], bounds)[1][0]
    every = minimise(start_SM, x_VR, np.tile(np.log(losses), (len(start_SM), 1)), bounds)[1]
    theirs = min(_lbfgs(start, x_VR, np.log(losses)) for start in start_SM[::9])
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert np.median(every) == pytest.approx(ours, rel=1e-4)


def _lbfgs(start: np.ndarray, x_VR: np.ndarray, y_R: np.ndarray) -> float:
    theta = torch.tensor(start, requires_grad=True)
    x, y = torch.tensor(x_VR), torch.tensor(y_R)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        terms = [theta[0].expand(len(y)), theta[1] - theta[2] * x[0], theta[3] - theta[4] * x[1]]
        loss = torch.nn.functional.huber_loss(torch.stack(terms).logsumexp(0), y, delta=DELTA, reduction="sum")
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(objective(theta.detach().numpy()[None], x_VR, y_R[None])[0])


def test_one_bad_run_does_not_carry_the_law_away() -> None:
    losses = _truth("ND", *GRID)
    losses[7] *= 1.3
    law = fit_law(_points("ND", *GRID), list(losses), replicas=20, hold_out=False)
    assert law.parameters()["E"].value == pytest.approx(E, rel=0.01)
    assert law.residuals()[7] == pytest.approx(0.3, abs=0.01)


def test_the_largest_rung_is_predicted_by_the_others() -> None:
    law = _noisy("N", np.geomspace(1e7, 3e9, 6), np.ones(6), 0.003, seed=1, replicas=100)
    held = law.held_out
    assert held is not None
    assert held.point == {"N": 3e9}
    assert held.measured == law.losses_R[-1]
    assert 0 < abs(held.error) < 0.05
    assert held.predicted.low < held.predicted.value < held.predicted.high


def test_beyond_the_range_no_value_comes_without_a_warning() -> None:
    law = _noisy("ND", *GRID, 0.003, seed=0, replicas=50, hold_out=False)
    assert law.predict({"N": SIZES[-1], "D": DATA[0]}).warnings == ()
    (above,) = law.predict({"N": 1e10, "D": 1e9}).warnings
    assert above.startswith("EXTRAPOLATED: 1e+10 parameters are 10 times above")
    assert len(law.predict({"N": 1e6, "D": 1e12}).warnings) == 2
    cost = Cost.of(list(GRID[0]), list(GRID[1]), list(6 * GRID[0] * GRID[1]))
    assert any("FLOPs are 10 times above" in line for line in compute_optimal(law, cost, 10 * cost.high).warnings)
    assert not any("FLOPs" in line for line in compute_optimal(law, cost, cost.high).warnings)


def test_the_optimum_is_the_least_loss_along_the_budget() -> None:
    """Also where FLOPs are not 6·N·D."""
    n, d = GRID
    law = fit_law(_points("ND", n, d), list(_truth("ND", n, d)), replicas=10, hold_out=False)
    cost = Cost.of(list(n), list(d), list(20 * n**0.9 * d))
    assert (cost.gamma, math.exp(cost.log_c)) == (pytest.approx(0.9), pytest.approx(20))
    optimum = compute_optimal(law, cost, 1e19)
    sizes = np.geomspace(1e7, 1e10, 20_001)
    along = [law.predict({"N": s, "D": 1e19 / (20 * s**0.9)}).loss.value for s in sizes[::200]]
    assert optimum.loss.value <= min(along) + 1e-9
    scanned = _truth("ND", sizes, 1e19 / (20 * sizes**0.9))
    assert optimum.parameters.value == pytest.approx(sizes[scanned.argmin()], rel=0.01)
    assert 20 * optimum.parameters.value**0.9 * optimum.tokens.value == pytest.approx(1e19)


@pytest.mark.parametrize(
    ("points", "losses", "said"),
    [
        ({"N": [1, 2, 3]}, [3, 2, 1], "needs more rungs"),
        ({"N": [1, 1, 2, 2]}, [3, 3, 2, 2], "2 values of parameters cannot tell E"),
        ({"N": [1, 2, 3, 4], "D": [1, 2, 1, 2]}, [4, 3, 2, 1], "needs more rungs"),
        ({"N": [1, 2, 3] * 2, "D": [1, 1, 1, 2, 2, 2]}, [6, 5, 4, 3, 2, 1], "2 values of tokens"),
        ({"N": [1, 2, 4, 8, 16, 32], "D": [20, 40, 80, 160, 320, 640]}, [6, 5, 4, 3, 2, 1], "cannot be separated"),
        ({"N": [1, 2, 3, 4]}, [3, 2, 1, float("nan")], "positive numbers"),
    ],
)
def test_what_rungs_cannot_tell_is_refused(points: dict[str, list[float]], losses: list[float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        fit_law(points, losses)


def test_few_rungs_say_so_and_are_wide() -> None:
    many = _noisy("N", np.geomspace(1e7, 1e9, 12), np.ones(12), 0.003, seed=2, replicas=200)
    few = _noisy("N", np.geomspace(1e7, 1e9, 4), np.ones(4), 0.003, seed=2, replicas=200)
    assert any(line.startswith("FEW RUNGS: 4 for 3") for line in few.warnings)
    assert not any(line.startswith("FEW") for line in many.warnings)
    of_many, of_few = many.parameters()["E"], few.parameters()["E"]
    assert of_few.high - of_few.low > 2 * (of_many.high - of_many.low)
    # The two are nearly one parameter wherever sizes span two decades.
    assert any(line.startswith("BOUND TOGETHER: E and alpha") for line in many.warnings)


def test_a_fit_at_a_bound_says_so() -> None:
    sizes = np.geomspace(1e7, 1e9, 8)
    law = fit_law({"N": list(sizes)}, list(20.0 - np.log(sizes) / 2), replicas=20)
    assert any(line.startswith("AT A BOUND: E") for line in law.warnings)


def test_quantiles_of_t() -> None:
    # From the usual tables.
    known = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042}
    for freedom, value in known.items():
        assert t_quantile(freedom) == pytest.approx(value, rel=0.01)


def test_log_loss_is_the_sum_of_powers() -> None:
    theta = np.array([[math.log(E), math.log(A), ALPHA, math.log(B), BETA]])
    assert np.exp(log_loss(theta, np.log(np.stack(GRID))))[0] == pytest.approx(_truth("ND", *GRID))
