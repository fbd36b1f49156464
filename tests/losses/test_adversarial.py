"""The adversarial losses against their formulas, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ibq_scale.losses.adversarial import LeCAM, discriminator_hinge, generator_non_saturating


def test_hinge() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert float(discriminator_hinge(real, fake)) == pytest.approx(0.5 * (0.5 / 2 + 1.0 / 2))


def test_non_saturating_takes_an_images_mean_first() -> None:
    fake = torch.tensor([[[[4.0, -2.0]]], [[[0.0, 0.0]]]])
    expected = (math.log1p(math.exp(-1.0)) + math.log(2.0)) / 2
    assert float(generator_non_saturating(fake)) == pytest.approx(expected)


def test_lecam_pulls_logits_to_the_other_sides_average_and_keeps_its_state() -> None:
    lecam = LeCAM(0.9)
    lecam.update(torch.tensor(1.0), torch.tensor(-2.0))
    assert (float(lecam.real), float(lecam.fake)) == (pytest.approx(0.1), pytest.approx(-0.2))
    real, fake = torch.tensor([0.3]), torch.tensor([-0.5])
    assert float(lecam.penalty(real, fake)) == pytest.approx(0.5**2 + 0.6**2)
    other = LeCAM(0.9)
    other.load_state_dict(lecam.state_dict())
    assert float(other.penalty(real, fake)) == float(lecam.penalty(real, fake))
