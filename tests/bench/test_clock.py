"""Time by part: exclusive, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ibq_scale.bench.clock import Clock


class _Time:
    """Passes only in `sleep`."""

    now = 0.0

    @classmethod
    def sleep(cls, seconds: float) -> None:
        cls.now += seconds


@pytest.fixture(autouse=True)
def _no_other_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ibq_scale.bench.clock.time", SimpleNamespace(perf_counter=lambda: _Time.now))


class _Slow(torch.autograd.Function):
    """The same number, after a while; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        _Time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _Time.sleep(ctx.backward_s)
        return grads[0], None, None


def test_parts_within_parts_forward_and_backward() -> None:
    clock = Clock(torch.device("cpu"))
    inner = clock.timed_both_ways(lambda x: {"y": _Slow.apply(x, 0.04, 0.08)}, "inner")
    x = torch.ones(2, requires_grad=True)
    clock.reset()
    with clock.part("outer"):
        y = _Slow.apply(inner(_Slow.apply(x, 0.02, 0.02))["y"], 0.02, 0.02)
        torch.autograd.backward(y.sum())
    _Time.sleep(0.02)
    spent = clock.seconds()
    assert torch.equal(x.grad, torch.ones(2))
    assert spent["inner"] == pytest.approx(0.12)
    assert spent["outer"] == pytest.approx(0.08)
    assert spent["other"] == pytest.approx(0.02)


def test_without_a_gradient_only_the_call_counts() -> None:
    clock = Clock(torch.device("cpu"))
    weight = torch.ones(2, requires_grad=True)
    part = clock.timed_both_ways(lambda x: _Slow.apply(x * weight, 0.02, 0.04), "part")
    clock.reset()
    with clock.part("around"):
        torch.autograd.backward(part(torch.ones(2)).sum())
    spent = clock.seconds()
    assert spent["part"] == pytest.approx(0.02)
    assert spent["around"] == pytest.approx(0.04)
