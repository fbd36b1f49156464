"""The adversarial losses against their formulas, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ibq_scale.losses.adversarial import (
    LastLayer,
    LeCAM,
    adaptive_weight,
    discriminator_hinge,
    generator_non_saturating,
)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_layers_gradient_is_autograds(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(8, 3, 3, padding=1).to(dtype)
    last = LastLayer(layer)
    out = layer(torch.randn(2, 8, 6, 6, dtype=dtype))
    fake = out.detach().float().requires_grad_()
    (output_gradient,) = torch.autograd.grad(fake.sin().square().mean(), fake)
    found = last.weight_gradient(output_gradient)
    (expected,) = torch.autograd.grad(out.float().sin().square().mean(), layer.weight)
    assert found.dtype == torch.float32
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert float((found - expected.float()).norm()) < tolerance * float(expected.float().norm())


def test_the_adaptive_weight_is_a_quotient_with_a_limit() -> None:
    reconstruction, nothing = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert float(adaptive_weight(reconstruction, torch.tensor([0.0, 2.0]))) == pytest.approx(5.0 / 2.0001)
    assert float(adaptive_weight(reconstruction, nothing)) == 1e4
    assert float(adaptive_weight(nothing, reconstruction)) == 0.0
