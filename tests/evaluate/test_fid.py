"""The Fréchet distance from sums equals that from all features at once, and torch-fidelity's whole calculation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ibq_scale.errors import UserError
from ibq_scale.evaluate.conventions import tensorflow_bilinear
from ibq_scale.evaluate.fid import INCEPTION, FeatureStatistics, Inception, moments_distance
from ibq_scale.evaluate.scores import inception_score


def _statistics(features: torch.Tensor, batch: int) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(batch):
        statistics.update(part, torch.ones(len(part)))
    return statistics


def test_mean_and_covariance_are_numpys_and_padding_counts_nothing() -> None:
    features = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) + 3.0
    statistics = _statistics(features, 8)
    statistics.update(torch.full((4, 7), 99.0), torch.zeros(4))
    found = statistics.mean_and_covariance()
    np.testing.assert_allclose(found["mu"], features.double().mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(found["sigma"], np.cov(features.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_the_distance_of_shifted_sets_is_the_shift() -> None:
    features = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0])
    a, b = (_statistics(*part).mean_and_covariance() for part in ((features, 64), (features + shift, 50)))
    assert moments_distance(a, b) == pytest.approx(float(shift.square().sum()), rel=1e-6)


def test_absent_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_SCALE_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=f"{INCEPTION} is not in {tmp_path}"):
        Inception(torch.device("cpu"))


class _Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.slow
def test_weights_that_would_run_code_or_are_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-fidelity would unpickle anything."""
    monkeypatch.setenv("IBQ_SCALE_WEIGHTS", str(tmp_path))
    for content in (_Evil(tmp_path / "mark"), {"fc.weight": torch.zeros(1)}):
        torch.save(content, tmp_path / INCEPTION)
        with pytest.raises(UserError, match=f"{INCEPTION} is damaged or another network's: 'ibq-scale fetch-weights'"):
            Inception(torch.device("cpu"))
    assert not (tmp_path / "mark").exists()


def test_sums_do_not_depend_on_their_order_and_refuse_what_is_no_number() -> None:
    """To the last bit: covariances of fewer vectors than dimensions are singular, and roots of zeros noise."""
    features = torch.randn(24, 60, generator=torch.Generator().manual_seed(3))
    parts = features.split(4)
    forward, backward = FeatureStatistics(60), FeatureStatistics(60)
    for statistics, order in ((forward, parts), (backward, parts[::-1])):
        for part in order:
            statistics.update(part, torch.ones(4))
    a, b = forward.mean_and_covariance(), backward.mean_and_covariance()
    assert all((a[name] == b[name]).all() for name in ("mu", "sigma"))
    for wrong in (1e8, float("nan")):
        backward.update(torch.full((1, 60), wrong), torch.ones(1))
        with pytest.raises(OverflowError, match="cannot be added"):
            backward.mean_and_covariance()


@pytest.mark.slow
def test_the_whole_calculation_is_torch_fidelitys(inception_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_fidelity

    monkeypatch.setenv("IBQ_SCALE_WEIGHTS", str(inception_weights))
    g = torch.Generator().manual_seed(2)
    real, fake = (torch.randint(256, (12, 3, 64, 64), dtype=torch.uint8, generator=g) for _ in range(2))
    fake = fake // 2
    network = Inception(torch.device("cpu"))
    features, logits, spatial = zip(*(network(tensorflow_bilinear(images)) for images in (real, fake)), strict=True)
    theirs = torch_fidelity.calculate_metrics(
        input1=_Images(fake),
        input2=_Images(real),
        fid=True,
        isc=True,
        cuda=False,
        verbose=False,
        batch_size=12,
        feature_extractor_weights_path=str(inception_weights / INCEPTION),
    )
    distance = moments_distance(*(_statistics(part, 12).mean_and_covariance() for part in features))
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    mean, deviation = inception_score(logits[1])
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-3, abs=1e-9)
    direct = network._network(real)
    assert torch.equal(features[0], direct[0])
    assert torch.equal(logits[0], direct[1])
    assert spatial[0].shape == (12, 17 * 17 * 7)


class _Images(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i]
