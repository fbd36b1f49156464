"""Inception score, precision and recall are torch-fidelity's, and what they must be where the answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ibq_scale.distributed.world import World
from ibq_scale.evaluate import scores
from ibq_scale.evaluate.fid import moments_distance
from ibq_scale.evaluate.scores import gather_rows, inception_score, precision_and_recall
from tests.ranks import run_ranks


def _normal(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_inception_scores_that_are_known() -> None:
    """Sure of one class each, all classes equally often: as many as there are classes. Never sure: 1."""
    classes = torch.eye(4).repeat(1000, 1)
    mean, deviation = inception_score(100 * classes)
    assert mean == pytest.approx(4.0, abs=0.05)
    assert deviation < 0.05
    assert inception_score(torch.zeros(40, 7)) == pytest.approx((1.0, 0.0))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_distance_of_gaussians_in_closed_form(rank: int) -> None:
    """Of commuting covariances: |mu1 - mu2|² + Σ (√s1 - √s2)²."""
    g = np.random.default_rng(rank)
    s1, s2, shift = g.uniform(0.1, 4, 6), g.uniform(0.1, 4, 6), g.normal(size=6)
    basis, _ = np.linalg.qr(g.normal(size=(6, 6)))
    a = {"mu": np.zeros(6), "sigma": basis @ np.diag(s1) @ basis.T}
    b = {"mu": shift, "sigma": basis @ np.diag(s2) @ basis.T}
    expected = (shift**2).sum() + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
    assert moments_distance(a, b) == pytest.approx(expected, rel=1e-9)


def _on_ranks(rank: int, world_size: int) -> dict[str, Any]:
    world = World(rank, world_size, rank, torch.device("cpu"))
    scores.ROWS = 16
    real, fake = _normal(150, 8, 1), 0.8 * _normal(90, 8, 2) + 0.3
    places = torch.arange(rank, 7, world_size).flip(0)
    return {
        "both": precision_and_recall(real, fake, world),
        "far": precision_and_recall(real, fake + 100, world),
        "same": precision_and_recall(real, real.flip(0), world),
        # Real ones, and some that are one of two clusters only.
        "half": precision_and_recall(torch.cat([real, real + 100]), real, world),
        "rows": gather_rows(places, torch.stack([places, places**2], dim=1)).tolist(),
    }


@pytest.mark.distributed
def test_precision_and_recall() -> None:
    """torch-fidelity's on three ranks that share the blocks; and what is plain without calculation."""
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    real, fake = _normal(150, 8, 1), 0.8 * _normal(90, 8, 2) + 0.3
    theirs = calculate_precision_recall_full(fake, real)
    for found in run_ranks(_on_ranks, 3):
        assert found["both"] == pytest.approx(theirs, abs=1e-6)
        assert found["far"] == (0.0, 0.0)
        assert found["same"] == (1.0, 1.0)
        assert found["half"] == (1.0, 0.5)
        assert found["rows"] == [[i, i * i] for i in range(7)]
