"""The head's cross-entropy equals the one of whole logits, and never has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_scale.models import head
from ibq_scale.models.head import Head


def _case(dtype: torch.dtype) -> tuple[Head, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    module = Head(32, 640)
    module.weight.data = torch.randn(640, 32, generator=g)
    x = torch.randn(3, 50, 32, generator=g).to(dtype).requires_grad_()
    return module.to(dtype), x, torch.randint(640, (3, 50), generator=g)


@pytest.fixture(params=["torch's operator", "older torch"])
def torchs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Both ways to the losses: that operator is new in torch 2.14. How much more bf16's rounding of logits costs."""
    if request.param == "older torch":
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    elif not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    return 2.5 if request.param == "older torch" else 1.0


@pytest.mark.parametrize("rows", [1, 64, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_losses_and_gradients_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, torchs: float, rows: int, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 640 * rows)
    module, x, targets = _case(dtype)
    weights = torch.rand(3, 50)
    losses = module(x, targets)
    torch.autograd.backward((losses * weights).sum())
    exact_x, exact_w = x.detach().double().requires_grad_(), module.weight.detach().double().requires_grad_()
    exact = F.cross_entropy((exact_x @ exact_w.T).flatten(0, 1), targets.flatten(), reduction="none").view(3, 50)
    torch.autograd.backward((exact * weights).sum())
    assert (losses.shape, losses.dtype) == ((3, 50), torch.float32)
    assert x.grad is not None
    assert module.weight.grad is not None
    for found, wanted in [(losses, exact), (x.grad, exact_x.grad), (module.weight.grad, exact_w.grad)]:
        assert wanted is not None
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error.item() < tolerance * torchs
    # Every token's rounding is its own, so the mean has more digits than bf16.
    assert losses.mean().item() == pytest.approx(exact.mean().item(), rel=3e-4)


def test_without_targets_it_gives_logits() -> None:
    module, x, _ = _case(torch.float32)
    torch.testing.assert_close(module(x), x @ module.weight.T)


def _largest_allocation(call: Callable[[], Tensor]) -> int:
    """Bytes, forward and backward, as the allocator itself tells: operators may hide what is within them."""
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.backward(call())
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    return max(int(event.nbytes()) for event in events if event.name() == "[memory]")


@pytest.mark.usefixtures("torchs")
def test_the_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 640 * 10)
    module, x, targets = _case(torch.float32)
    logits = 4 * targets.numel() * 640
    assert _largest_allocation(lambda: module(x, targets).sum()) < logits / 3
    assert _largest_allocation(lambda: F.cross_entropy(module(x).flatten(0, 1), targets.flatten())) >= logits
