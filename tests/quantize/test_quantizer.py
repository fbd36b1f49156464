"""The tiled and sharded quantizers against the dense oracle, at the edges and in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.errors import UserError
from ibq_scale.quantize.ibq import ibq_dense
from ibq_scale.quantize.quantizer import encode, initial_codebook, lookup, quantize, rows_of
from ibq_scale.quantize.types import Quantized
from tests.ranks import run_ranks


def _config(codes: int, dim: int, **changes: Any) -> QuantizerConfig:
    return QuantizerConfig(
        **{"codebook_size": codes, "dim": dim, "entropy_temperature": 0.3, "tile_bytes": 900} | changes
    )


def _inputs(tokens: int, codes: int, dim: int, seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, dim, generator=g, dtype=torch.float64) * scale
    return z.requires_grad_(), torch.randn(codes, dim, generator=g, dtype=torch.float64).requires_grad_()


def _loss(out: Quantized, upstream: torch.Tensor) -> torch.Tensor:
    return (out.z_q_ND * upstream).sum() + 0.7 * out.quantization_loss + 0.3 * out.entropy_loss


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 13),
    codes=st.integers(1, 17),
    dim=st.integers(1, 5),
    tile_bytes=st.integers(1, 4000),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
    beta_on=st.sampled_from(["codebook", "commitment"]),
)
def test_tiled_equals_the_oracle_for_any_shape_and_tile(
    tokens: int, codes: int, dim: int, tile_bytes: int, scale: float, seed: int, beta_on: str
) -> None:
    config = _config(codes, dim, tile_bytes=tile_bytes, beta_on=beta_on)
    upstream = _inputs(tokens, codes, dim, seed + 1000)[0].detach()
    grads = []
    outs = []
    for form in (ibq_dense, quantize):
        z, codebook = _inputs(tokens, codes, dim, seed, scale)
        out = form(z, codebook, config)
        grads.append(torch.autograd.grad(_loss(out, upstream), [z, codebook]))
        outs.append(out)
    for expected, actual in zip(outs[0], outs[1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    for expected, actual in zip(grads[0], grads[1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_entropy_gradient_is_the_derivative_of_the_entropy() -> None:
    config = _config(7, 3, tile_bytes=400)
    z, codebook = _inputs(5, 7, 3)
    assert torch.autograd.gradcheck(lambda a, b: quantize(a, b, config).entropy_loss, (z, codebook))


def test_the_lowest_index_wins_a_tie() -> None:
    codebook = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    z = torch.tensor([[2.0, 0.5]])
    config = _config(4, 2)
    assert quantize(z, codebook, config).indices_N.tolist() == [1]
    assert encode(z, codebook, config).tolist() == [1]


def test_bf16_tokens_get_bf16_codes_and_fp32_losses() -> None:
    z = torch.randn(6, 4).bfloat16().requires_grad_()
    out = quantize(z, initial_codebook(_config(8, 4), 0, 0, 8), _config(8, 4))
    assert out.z_q_ND.dtype == torch.bfloat16
    assert out.quantization_loss.dtype == out.entropy_loss.dtype == torch.float32
    (out.z_q_ND.float().sum() + out.entropy_loss).backward()
    assert z.grad is not None
    assert z.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("bad", "named"), [("z", "z holds"), ("codebook", "the codebook holds")])
def test_non_finite_input_is_named(bad: str, named: str) -> None:
    z, codebook = torch.randn(4, 3), torch.randn(8, 3)
    (z if bad == "z" else codebook)[1, 1] = float("nan")
    with pytest.raises(ValueError, match=named):
        quantize(z, codebook, _config(8, 3))


def test_vq_takes_the_nearest_code_and_passes_the_gradient_straight_through() -> None:
    config = _config(8, 3, kind="vq")
    z, codebook = torch.randn(20, 3, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    out = quantize(z, codebook, config)
    assert torch.equal(out.indices_N, torch.cdist(z, codebook).argmin(1))
    upstream = torch.randn(20, 3)
    (grad_z,) = torch.autograd.grad((out.z_q_ND * upstream).sum(), z, retain_graph=True)
    assert torch.equal(grad_z, upstream)
    (grad_codebook,) = torch.autograd.grad(out.quantization_loss, codebook)
    unused = torch.ones(8, dtype=torch.bool)
    unused[out.indices_N] = False
    assert bool((grad_codebook[unused] == 0).all())
    assert bool((grad_codebook[~unused] != 0).any())


def test_initial_codebook_does_not_depend_on_the_split() -> None:
    config = _config(3000, 5)
    whole = initial_codebook(config, 3, 0, 3000)
    for ranks in (2, 3, 5):
        parts = [initial_codebook(config, 3, *rows_of(r, ranks, 3000)) for r in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)
    assert abs(float(whole.std()) - 1.0) < 0.05
    assert not torch.equal(whole, initial_codebook(config, 4, 0, 3000))


def test_a_group_that_does_not_divide_the_codebook_is_refused() -> None:
    with pytest.raises(UserError, match="not divided"):
        rows_of(0, 3, 1024)


def _sharded_case(rank: int, world: int, changes: dict[str, Any], seed: int) -> tuple[Any, ...]:
    tokens, codes, dim = 12, 16, 3
    config = _config(codes, dim, **changes)
    z_all, codebook_all = _inputs(tokens, codes, dim, seed)
    upstream = _inputs(tokens, codes, dim, seed + 1000)[0].detach()
    start, stop = rows_of(rank, world, codes)
    mine = slice(rank * tokens // world, (rank + 1) * tokens // world)
    z = z_all[mine].detach().requires_grad_()
    rows = codebook_all[start:stop].detach().requires_grad_()
    group = dist.group.WORLD
    out = quantize(z, rows, config, group)
    # Each rank weighs its loss differently: the backward pass must keep the ranks' upstream gradients apart.
    ((rank + 1.0) * _loss(out, upstream[mine])).backward()
    found = encode(z, rows, config, group)
    return z.grad, rows.grad, out.indices_N, found, lookup(found, rows, group), [float(v) for v in out[2:]]


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("changes", [{}, {"entropy_scope": "local"}, {"kind": "vq"}], ids=["global", "local", "vq"])
def test_sharded_equals_the_sum_of_the_ranks_losses_on_one(world: int, changes: dict[str, Any]) -> None:
    results = run_ranks(_sharded_case, world, changes, 5)
    tokens, codes, dim = 12, 16, 3
    config = _config(codes, dim, **changes)
    z, codebook = _inputs(tokens, codes, dim, 5)
    upstream = _inputs(tokens, codes, dim, 1005)[0].detach()
    whole = quantize(z, codebook, config)
    total = torch.zeros((), dtype=torch.float64)
    for rank in range(world):
        mine = slice(rank * tokens // world, (rank + 1) * tokens // world)
        part = quantize(z[mine], codebook, config)
        if config.kind == "ibq" and config.entropy_scope == "global":
            part = part._replace(entropy_loss=_with_global_batch_entropy(z, codebook, config, z[mine]))
        total = total + (rank + 1.0) * _loss(part, upstream[mine])
    grad_z, grad_codebook = torch.autograd.grad(total, [z, codebook])
    torch.testing.assert_close(torch.cat([r[0] for r in results]), grad_z, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), grad_codebook, rtol=1e-8, atol=1e-10)
    assert torch.equal(torch.cat([r[2] for r in results]), whole.indices_N)
    assert torch.equal(torch.cat([r[3] for r in results]), whole.indices_N)
    assert torch.equal(torch.cat([r[4] for r in results]), codebook[whole.indices_N])


def _with_global_batch_entropy(
    z: torch.Tensor, codebook: torch.Tensor, config: QuantizerConfig, mine: torch.Tensor
) -> torch.Tensor:
    """A rank's entropy loss: its own tokens' sample entropy, everyone's batch entropy."""
    only_sample = config.model_copy(update={"batch_entropy_weight": 0.0})
    only_batch = config.model_copy(update={"sample_entropy_weight": 0.0})
    return ibq_dense(mine, codebook, only_sample).entropy_loss + ibq_dense(z, codebook, only_batch).entropy_loss
