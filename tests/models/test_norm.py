"""Norms in bf16: statistics as in fp32, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ibq_scale.models.norm import BatchNorm, GroupNorm


def _input(mean: float) -> Tensor:
    return torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0)).add(mean).bfloat16()


def _weights(norm: nn.GroupNorm | nn.BatchNorm2d) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(64, generator=g) + 0.5).copy_(norm.weight.bfloat16())
        norm.bias.copy_(torch.randn(64, generator=g)).copy_(norm.bias.bfloat16())


def _both_ways(norm: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    torch.autograd.backward((y.double() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum())
    return [y.detach(), *(t.grad for t in (x, *norm.parameters()))]  # type: ignore[misc]


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("kind", ["group", "batch"])
def test_bf16_is_fp64_rounded(mean: float, kind: str) -> None:
    """With a large mean, statistics in bf16 would be off by whole standard deviations."""

    def make(own: bool) -> nn.Module:
        if kind == "group":
            norm: nn.Module = GroupNorm(32, 64, eps=1e-6) if own else nn.GroupNorm(32, 64, eps=1e-6)
        else:
            norm = BatchNorm(64) if own else nn.BatchNorm2d(64)
        _weights(norm)  # type: ignore[arg-type]
        return norm

    x = _input(mean)
    narrow = make(own=True)
    for parameter in narrow.parameters():
        # As DeepSpeed does: buffers stay in fp32.
        parameter.data = parameter.data.bfloat16()
    found, exact = _both_ways(narrow, x), _both_ways(make(own=False).double(), x.double())
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - theirs).abs().max()) < 2**-7 * float(theirs.abs().max())


def test_wide_input_is_torchs_own_to_the_bit() -> None:
    norm, own = GroupNorm(32, 64, eps=1e-6), nn.GroupNorm(32, 64, eps=1e-6)
    for x in (_input(1.0).float(), _input(1.0).double()):
        assert all(torch.equal(a, b) for a, b in zip(_both_ways(norm.to(x), x), _both_ways(own.to(x), x), strict=True))


def test_channels_last_input_reaches_the_operator_in_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 to 2.13 demand on CUDA."""
    forward, layouts = torch.native_group_norm, []

    def checked(x: Tensor, *rest: object) -> object:
        layouts.append(x.is_contiguous())
        return forward(x, *rest)

    monkeypatch.setattr(torch, "native_group_norm", checked)
    norm = GroupNorm(32, 64).bfloat16()
    x = torch.randn(2, 64, 4, 6).bfloat16()
    results = []
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        given = given.detach().requires_grad_()
        out = norm(given)
        results.append((out, *torch.autograd.grad((out * x).sum(), [given, *norm.parameters()])))
    assert layouts == [True, True]
    for plain, last in zip(*results, strict=True):
        assert torch.equal(plain, last)
