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
from ibq_scale.quantize.collectives import Shards, sizes_in
from ibq_scale.quantize.ibq import ibq_dense
from ibq_scale.quantize.quantized import Quantized
from ibq_scale.quantize.quantizer import batch_sums, encode, find, initial_codebook, lookup, quantize, rows_of
from ibq_scale.quantize.tiled_backend import tile_tokens
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


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 13),
    codes=st.integers(1, 17),
    dim=st.integers(1, 5),
    tile_bytes=st.integers(1, 4000),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
    beta_on=st.sampled_from(["codebook", "commitment"]),
    straight_through=st.booleans(),
    double_quantization=st.booleans(),
)
def test_tiled_equals_the_oracle_for_any_shape_tile_and_ablation(
    tokens: int,
    codes: int,
    dim: int,
    tile_bytes: int,
    scale: float,
    seed: int,
    beta_on: str,
    straight_through: bool,
    double_quantization: bool,
) -> None:
    switches = {"straight_through": straight_through, "double_quantization": double_quantization}
    config = _config(codes, dim, tile_bytes=tile_bytes, beta_on=beta_on, **switches)
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


def test_a_tile_of_one_buffer_has_twice_the_tokens() -> None:
    """The codebook is read from memory less often where the backward pass's second buffer is not needed."""
    like = torch.empty(0)
    assert [tile_tokens(100, 2 * 4 * 100 * 8, like, buffers) for buffers in (1, 2)] == [16, 8]
    assert tile_tokens(100, 1, like, 2) == 1


def test_training_goes_on_after_an_evaluation_in_inference_mode() -> None:
    """Both share scratch, and the evaluation's is the larger one here."""
    config = _config(64, 3, tile_bytes=None)
    with torch.inference_mode():
        encode(torch.randn(5000, 3, dtype=torch.float16).to(torch.float32), torch.randn(64, 3), config)
        quantize(torch.randn(5000, 3), torch.randn(64, 3), config)
    z, codebook = torch.randn(6, 3, requires_grad=True), torch.randn(64, 3, requires_grad=True)
    out = quantize(z, codebook, config)
    (out.z_q_ND.sum() + out.entropy_loss).backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())


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


TOKENS, CODES, DIM = 12, 16, 4
CASES: dict[str, dict[str, Any]] = {
    "global": {},
    "local": {"entropy_scope": "local"},
    "without batch entropy": {"batch_entropy_weight": 0.0},
    "without straight-through": {"straight_through": False},
    "vq": {"kind": "vq"},
    "lfq": {"kind": "lfq"},
    "lfq local": {"kind": "lfq", "entropy_scope": "local"},
    # A sum over shards and one over the whole are rounded alike to fp32 only.
    "triton": {"backend": "triton", "logit_precision": "tf32"},
    "cublas": {"backend": "cublas"},
    "cublas local": {"backend": "cublas", "entropy_scope": "local"},
    "triton local": {"backend": "triton", "logit_precision": "tf32", "entropy_scope": "local"},
}
SIZES = {2: [[6, 6], [7, 5]], 4: [[3, 3, 3, 3], [1, 5, 4, 2]]}


def _case_inputs(changes: dict[str, Any]) -> tuple[QuantizerConfig, torch.Tensor, torch.Tensor, torch.Tensor]:
    config = _config(CODES, DIM, **changes)
    z, codebook = _inputs(TOKENS, CODES, DIM, 5)
    if config.kind == "lfq":
        codebook = initial_codebook(config, 0, 0, CODES).double().requires_grad_()
    upstream = _inputs(TOKENS, CODES, DIM, 1005)[0].detach()
    # Triton's kernels are fp32.
    dtype = torch.float64 if config.backend == "auto" else torch.float32
    return config, *(t.detach().to(dtype).requires_grad_() for t in (z, codebook)), upstream.to(dtype)


def _ranges(sizes: list[int]) -> list[slice]:
    return [slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for rank in range(len(sizes))]


def _sharded_cases(rank: int, world: int) -> list[tuple[Any, ...]]:
    group = dist.group.WORLD
    results = []
    for sizes in SIZES[world]:
        for changes in CASES.values():
            config, z_all, codebook, upstream = _case_inputs(changes)
            start, stop = rows_of(rank, world, CODES)
            mine = _ranges(sizes)[rank]
            z = z_all[mine].detach().requires_grad_()
            rows = codebook[start:stop].detach().requires_grad_()
            assert sizes_in(len(z), group, z.device) == sizes
            out = quantize(z, rows, config, Shards(group, sizes=sizes))
            # Each rank weighs its loss differently: the backward pass must keep the ranks' upstream gradients apart.
            ((rank + 1.0) * _loss(out, upstream[mine])).backward()
            found = find(z, rows, config, group, sizes).index_N
            same_size = sizes if len(set(sizes)) == 1 else None
            seen = lookup(found, rows, group) if same_size else None
            results.append((z.grad, rows.grad, out.indices_N, found, seen))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_equals_the_sum_of_the_ranks_losses_on_one(world: int) -> None:
    by_rank = run_ranks(_sharded_cases, world)
    numbers = iter(range(len(SIZES[world]) * len(CASES)))
    for sizes in SIZES[world]:
        for name, changes in CASES.items():
            number = next(numbers)
            results = [found[number] for found in by_rank]
            config, z, codebook, upstream = _case_inputs(changes)
            whole = quantize(z, codebook, config)
            total = torch.zeros((), dtype=z.dtype)
            for rank, mine in enumerate(_ranges(sizes)):
                part = quantize(z[mine], codebook, config)
                if config.kind != "vq" and config.entropy_scope == "global":
                    part = part._replace(entropy_loss=_with_global_batch_entropy(z, codebook, config, z[mine]))
                total = total + (rank + 1.0) * _loss(part, upstream[mine])
            grad_z, grad_codebook = torch.autograd.grad(total, [z, codebook], allow_unused=True)
            close = {"rtol": 1e-8, "atol": 1e-10} if z.dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
            explain = {"msg": lambda m, n=name, s=sizes: f"{n}, tokens {s}: {m}"}
            torch.testing.assert_close(torch.cat([r[0] for r in results]), grad_z, **close, **explain)
            if config.kind != "lfq":
                torch.testing.assert_close(torch.cat([r[1] for r in results]), grad_codebook, **close, **explain)
            assert torch.equal(torch.cat([r[2] for r in results]), whole.indices_N), name
            assert torch.equal(torch.cat([r[3] for r in results]), whole.indices_N), name
            if results[0][4] is not None:
                assert torch.equal(torch.cat([r[4] for r in results]), codebook[whole.indices_N]), name


@pytest.mark.parametrize("kind", ["ibq", "lfq"])
@pytest.mark.parametrize("backend", ["tiled", "triton", "cublas"])
def test_micro_batches_with_the_steps_mean_have_the_gradient_of_the_whole_batch(kind: str, backend: str) -> None:
    config, z, codebook, _ = _case_inputs({"kind": kind, "backend": backend})
    whole = quantize(z, codebook, config)
    expected = torch.autograd.grad(whole.entropy_loss, [z, codebook], allow_unused=True)
    parts = z.detach().split(TOKENS // 3)
    sums, counts = zip(*(batch_sums(part, codebook, config) for part in parts), strict=True)
    mean = torch.stack(sums).sum(dim=0) / torch.stack(counts).sum()
    mine = [part.clone().requires_grad_() for part in parts]
    quantized = [quantize(part, codebook, config, mean_K=mean) for part in mine]
    for part in quantized:
        torch.testing.assert_close(part.batch_entropy, whole.batch_entropy)
    loss = torch.stack([part.entropy_loss for part in quantized]).mean()
    torch.testing.assert_close(loss.detach(), whole.entropy_loss.detach())
    *grads, grad_codebook = torch.autograd.grad(loss, [*mine, codebook], allow_unused=True)
    torch.testing.assert_close(torch.cat(grads), expected[0])
    if kind == "ibq":
        torch.testing.assert_close(grad_codebook, expected[1])


def _with_global_batch_entropy(
    z: torch.Tensor, codebook: torch.Tensor, config: QuantizerConfig, mine: torch.Tensor
) -> torch.Tensor:
    """A rank's entropy loss: its own tokens' sample entropy, everyone's batch entropy."""
    form = ibq_dense if config.kind == "ibq" else quantize
    only_sample = config.model_copy(update={"batch_entropy_weight": 0.0})
    only_batch = config.model_copy(update={"sample_entropy_weight": 0.0})
    return form(mine, codebook, only_sample).entropy_loss + form(z, codebook, only_batch).entropy_loss
