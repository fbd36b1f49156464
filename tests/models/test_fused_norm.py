"""GroupNorm and SiLU by the Triton kernels: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter

from ibq_scale.models import fused_norm, norm
from ibq_scale.models.autoencoder import ResnetBlock, _run
from ibq_scale.models.fused_norm import group_norm
from tests.tools.norm_bytes import eager, fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
# The interpreter truncates to bf16, where GPUs round to the nearest.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> list[Tensor]:
    """x, weight, bias, ∂L/∂y; the weights as wide as x or wider."""
    g = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=g) for _ in range(2))
    weight, bias = torch.rand(shape[1], generator=g) + 0.5, torch.randn(shape[1], generator=g)
    x, upstream = (t.to(DEVICE, dtype, memory_format=torch.channels_last) for t in (x + mean, upstream))
    narrow = torch.float32 if dtype == torch.float16 else dtype
    return [x, weight.to(DEVICE, narrow), bias.to(DEVICE, narrow), upstream]


def _passes(form: Any, inputs: list[Tensor]) -> list[Tensor]:
    *leaves, upstream = (t.detach().requires_grad_() for t in inputs)
    y = form(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def _fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm(x, weight, bias, 32, 1e-6, silu=True)


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight, bias, 1e-6))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "silu"),
    [
        ((2, 64, 9, 15), torch.float32, True),
        ((1, 96, 5, 7), torch.bfloat16, False),
        ((1, 512, 3, 3), torch.float16, True),
        ((2, 32, 1, 3), torch.float32, False),
        ((1, 160, 2, 5), torch.bfloat16, True),
    ],
)
def test_equal_to_float64_at_any_size(shape: tuple[int, ...], dtype: torch.dtype, silu: bool) -> None:
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _plain(x, weight, bias) if silu else F.group_norm(x, 32, weight, bias, 1e-6)

    inputs = _inputs(shape, dtype)
    found = _passes(lambda x, weight, bias: group_norm(x, weight, bias, 32, 1e-6, silu=silu), inputs)
    exact = _passes(plain, [t.double() for t in inputs])
    for ours, theirs, like in zip(found, exact, (inputs[0], *inputs), strict=False):
        assert ours.dtype == like.dtype
        assert float((ours.double() - theirs).abs().max()) <= ROUNDING[like.dtype] * float(theirs.abs().max())
    for image in found[:2]:
        assert image.is_contiguous(memory_format=torch.channels_last)


def test_a_large_mean_loses_no_digits() -> None:
    """A mean of 1,000 σ in fp32: Σ x² − (Σ x)²/n would leave one digit of σ, and bf16 statistics none."""
    inputs = _inputs((1, 32, 9, 15), torch.float32, mean=1000.0)
    for ours, theirs in zip(_passes(_fused, inputs), _passes(_plain, [t.double() for t in inputs]), strict=True):
        # fp32 holds the mean itself to 6e-5, and a channel's gradient has 135 such errors.
        assert float((ours.double() - theirs).abs().max()) <= 1e-3 * float(theirs.abs().max())


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU has an order of its own")
def test_the_order_in_which_programs_run_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = interpreter.interpreter_builder
    plain = builder.set_grid_idx
    monkeypatch.setattr(fused_norm, "TILE", 512)
    found = []
    for moved in (lambda x, n: x, lambda x, n: n - 1 - x):

        def permuted(*at: int, moved: Any = moved) -> None:
            plain(*(moved(x, n) for x, n in zip(at, builder.grid_dim, strict=True)))

        monkeypatch.setattr(builder, "set_grid_idx", permuted)
        found.append(_passes(_fused, _inputs((2, 32, 5, 9), torch.float32)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_gradient_of_another_layout_gives_the_same() -> None:
    *inputs, upstream = _inputs((1, 32, 4, 6), torch.float32)
    found = _passes(_fused, [*inputs, upstream]), _passes(_fused, [*inputs, upstream.contiguous()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts what the interpreter does")
def test_little_more_than_the_images_themselves_is_moved() -> None:
    """x twice and y, then x and ∂L/∂y twice and ∂L/∂x. The rest are sums and statistics of tiles."""
    shape, size = (1, 64, 32, 32), 2 * 64 * 32 * 32
    forward, backward = fused(shape, torch.bfloat16)
    assert 3 * size < forward < 3.4 * size
    assert 5 * size < backward < 5.8 * size
    # The eager form, in elements of 2 and 4 bytes: to fp32, in order, norm, to bf16, SiLU.
    assert eager(shape, torch.bfloat16)[0] == pytest.approx((6 + 8 + 12 + 6 + 4) / 2 * size, rel=0.01)


@pytest.mark.slow
def test_a_block_trains_alike_with_kernels_checkpointing_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def passes(form: Any, block: ResnetBlock) -> list[Tensor]:
        weight = block.conv1.weight
        x = torch.linspace(-1, 2, 480).view(1, 32, 3, 5).to(weight, memory_format=torch.channels_last)
        y = form(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), list(block.parameters()))]

    torch.manual_seed(0)
    block = ResnetBlock(32, 64, 0.0)
    exact = deepcopy(block).double()
    block.to(DEVICE)
    plain = passes(exact, exact)
    monkeypatch.setattr(norm, "runs_fused", norm.fusible)
    launched = []
    launch = fused_norm.launch
    monkeypatch.setattr(fused_norm, "launch", lambda kernel, *rest: launched.append(kernel) or launch(kernel, *rest))
    ours = passes(block, block)
    assert launched.count("norm_apply") == launched.count("norm_grad_apply") == 2
    again = passes(lambda x: _run(block, x, True), block)
    assert launched.count("norm_apply") == 2 + 4, "the checkpointed pass runs once more"
    compiled = passes(torch.compile(block, backend="aot_eager", fullgraph=True), block)
    assert launched.count("norm_apply") == 2 + 4 + 2
    for found in (ours, again, compiled):
        for a, b in zip(found, plain, strict=True):
            assert float((a.cpu().double() - b).norm()) <= 1e-5 * float(b.norm())
