"""The Triton kernels against the dense oracle: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from triton.runtime import interpreter

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.errors import UserError
from ibq_scale.quantize import tiled_backend, tiles, triton_backend
from ibq_scale.quantize.backend import _obstacle, choose, describe
from ibq_scale.quantize.collectives import Shards, add_at_owned
from ibq_scale.quantize.compiled import Needs
from ibq_scale.quantize.ibq import ibq_dense
from ibq_scale.quantize.quantizer import find, quantize
from ibq_scale.scaling import flops
from tests.ranks import run_ranks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def _run(form: Any, size: tuple[int, int, int], scale: float = 1.0, **changes: Any) -> tuple[Any, ...]:
    tokens, codes, dim = size
    g = torch.Generator().manual_seed(0)
    z, upstream = (torch.randn(tokens, dim, generator=g).to(DEVICE) for _ in range(2))
    codebook = torch.randn(codes, dim, generator=g).to(DEVICE)
    z, codebook = (z * scale).requires_grad_(), codebook.requires_grad_()
    config = QuantizerConfig.model_validate(
        {"codebook_size": codes, "dim": dim, "entropy_temperature": 0.3, "logit_precision": "fp32"} | changes
    )
    out = form(z, codebook, config)
    loss = (out.z_q_ND * upstream).sum() + 0.7 * out.quantization_loss + 0.3 * out.entropy_loss
    return out, torch.autograd.grad(loss, [z, codebook])


@pytest.mark.parametrize(
    ("size", "scale", "changes"),
    [
        ((1, 1, 3), 1.0, {}),
        ((1, 70, 16), 1.0, {}),
        ((33, 1, 8), 1.0, {}),
        pytest.param((37, 101, 20), 1.0, {}, marks=pytest.mark.slow),
        ((37, 101, 20), 1.0, {"batch_entropy_weight": 0.0}),
        pytest.param((64, 260, 32), 0.3, {"entropy_temperature": 0.01}, marks=pytest.mark.slow),
        ((20, 64, 8), 30.0, {"entropy_temperature": 0.01}),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "cublas"])
def test_equal_to_the_oracle_at_any_size(
    size: tuple[int, int, int], scale: float, changes: dict[str, Any], backend: str
) -> None:
    expected, expected_grads = _run(ibq_dense, size, scale, **changes)
    found, grads = _run(quantize, size, scale, backend=backend, **changes)
    assert torch.equal(found.indices_N, expected.indices_N)
    for name in ("z_q_ND", "quantization_loss"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-5, atol=2e-5)
    rounding = _rounding_of_exponents(size, scale, changes.get("entropy_temperature", 0.3))
    for name in ("entropy_loss", "sample_entropy", "batch_entropy"):
        difference = float((getattr(found, name) - getattr(expected, name)).detach().abs())
        assert difference <= max(2e-5 * (1 + float(getattr(expected, name).detach().abs())), rounding), name
    for grad, wanted in zip(grads, expected_grads, strict=True):
        # ∂L_e/∂S has q times differences of r_k, whose |r_k| is at most 4 where a q of these few tokens is not 0.
        assert float((grad - wanted).abs().max()) <= max(1e-4, 4 * rounding) * float(wanted.abs().max())


def _rounding_of_exponents(size: tuple[int, int, int], scale: float, temperature: float) -> float:
    """What fp32 leaves open of S/τ, and so of q in parts of it: the kernels compute S for the sums and again for q, in
    tiles whose products may be summed in another order (here by BLAS, which goes by the CPU).
    """
    tokens, codes, dim = size
    largest = scale * dim**0.5 * (2 * torch.tensor(float(tokens * codes)).log()).sqrt().item()
    return torch.finfo(torch.float32).eps * largest / temperature


@pytest.mark.slow
def test_bf16_products_are_coarser_and_no_more() -> None:
    expected, expected_grads = _run(ibq_dense, (50, 77, 16))
    found, grads = _run(quantize, (50, 77, 16), backend="triton", logit_precision="bf16")
    assert found.entropy_loss != expected.entropy_loss, "nothing was rounded"
    torch.testing.assert_close(found.entropy_loss, expected.entropy_loss, rtol=0.01, atol=0.01)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert torch.nn.functional.cosine_similarity(grad.flatten(), wanted.flatten(), dim=0) > 0.999


def test_the_lowest_index_wins_a_tie_in_every_tile() -> None:
    codebook = torch.zeros(100, 4, device=DEVICE)
    codebook[[7, 8, 40, 99], 0] = 1.0
    z = torch.eye(4, device=DEVICE)[:1] * 2.0
    config = QuantizerConfig(codebook_size=100, dim=4, backend="triton", logit_precision="fp32")
    assert quantize(z, codebook, config).indices_N.tolist() == [7]
    assert find(z, codebook, config).index_N.tolist() == [7]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ibq", "vq"])
@pytest.mark.parametrize("search", ["fp32", "bf16"])
def test_the_kernels_search_is_exact(kind: str, search: str) -> None:
    g = torch.Generator().manual_seed(1)
    z, codebook = torch.randn(60, 16, generator=g).to(DEVICE), torch.randn(333, 16, generator=g).to(DEVICE)
    # In one part of the codes several are alike to bf16; some are the very same; one token ties with all.
    codebook[200:230] = codebook[200] * (1 + 1e-4 * torch.arange(30, device=DEVICE))[:, None]
    codebook[300:] = codebook[:33]
    z[3] = 0
    settings = {"kind": kind, "codebook_size": 333, "dim": 16, "search": search}
    found = find(z, codebook, QuantizerConfig.model_validate(settings | {"backend": "triton"}))
    pairs = z[:, None].double() * codebook.double() - (0.5 * codebook.double().square() if kind == "vq" else 0.0)
    assert torch.equal(found.index_N, pairs.sum(dim=2).argmax(dim=1))
    assert 0 < int(found.rescored) < 60


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists so short that tokens with soft probabilities are flat, and blocks so small that there are several."""
    monkeypatch.setattr(tiles, "CANDIDATES", 4)
    monkeypatch.setattr(triton_backend, "BLOCK_BYTES", 1)
    monkeypatch.setattr(triton_backend, "BLOCK_UNIT", 48)


def _mixed(
    form: Any, entropy_alone: bool = False, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Any, ...]:
    """Tokens from flat to peaked, side by side."""
    g = torch.Generator().manual_seed(3)
    upstream = torch.randn(37, 20, generator=g).to(DEVICE)
    z = torch.randn(37, 20, generator=g) * torch.logspace(-3, 1, 37)[:, None]
    codebook = torch.randn(101, 20, generator=g).to(DEVICE, dtype).requires_grad_()
    z = z.to(DEVICE, dtype).requires_grad_()
    config = QuantizerConfig.model_validate({"codebook_size": 101, "dim": 20, "logit_precision": "fp32"} | changes)
    out = form(z, codebook, config)
    others = (out.z_q_ND * upstream).sum() + 0.7 * out.quantization_loss
    return out, torch.autograd.grad(0.3 * out.entropy_loss + (0.0 if entropy_alone else 1.0) * others, [z, codebook])


@pytest.mark.slow
@pytest.mark.usefixtures("few_candidates")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flat_tokens_beside_peaked_ones_and_several_blocks(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if precision == "bf16":
        # A token is as flat as the list is long: with fewer places S/τ would be wide, and bf16 too coarse for it.
        monkeypatch.setattr(tiles, "CANDIDATES", 60)
    # softmax(S) itself is as coarse as bf16 makes it.
    alone = precision == "bf16"
    expected, expected_grads = _mixed(ibq_dense, alone)
    found, grads = _mixed(quantize, alone, backend="triton", logit_precision=precision)
    assert torch.equal(found.indices_N, expected.indices_N)
    error = {"fp32": 1e-5, "bf16": 0.02}[precision]
    torch.testing.assert_close(found.entropy_loss, expected.entropy_loss, rtol=error, atol=error)
    torch.testing.assert_close(found.sample_entropy, expected.sample_entropy, rtol=error, atol=error)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert float((grad - wanted).norm()) <= {"fp32": 1e-4, "bf16": 0.02}[precision] * float(wanted.norm())


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("batch_weight", [1.0, 0.0])
def test_the_cublas_backend_equals_float64_on_flat_and_peaked_tokens(scope: str, batch_weight: float) -> None:
    """Four blocks of 11 tokens at the most."""
    changes = {"batch_entropy_weight": batch_weight, "entropy_scope": scope, "entropy_temperature": 0.05}
    expected, expected_grads = _mixed(ibq_dense, dtype=torch.float64, **changes)
    found, grads = _mixed(quantize, backend="cublas", tile_bytes=2 * 4 * 101 * 11, **changes)
    assert torch.equal(found.indices_N, expected.indices_N)
    torch.testing.assert_close(found.entropy_loss.double(), expected.entropy_loss, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        # fp32 keeps the largest S/τ, some 3,000, to 2e-4.
        assert float((grad - wanted).norm()) <= 1e-4 * float(wanted.norm())


@pytest.mark.slow
def test_bf16_products_leave_codes_and_entropies_as_fp32_has_them() -> None:
    """Unit tokens at the recipe's temperature: rounding to bf16 moves S/τ by nats, and many codes are near the best."""
    g = torch.Generator().manual_seed(4)
    z, codebook = torch.randn(64, 64, generator=g).to(DEVICE), torch.randn(400, 64, generator=g).to(DEVICE)
    codebook[200:] = codebook[:200] + 0.04 * torch.randn(200, 64, generator=g).to(DEVICE)
    config = QuantizerConfig(codebook_size=400, dim=64, backend="triton", logit_precision="bf16")
    exact, rounded, ours = (
        _entropy_gradients(form, *(x.to(dtype) for x in (z, codebook)), config)
        for form, dtype in ((ibq_dense, torch.float64), (ibq_dense, torch.bfloat16), (quantize, torch.float32))
    )
    assert not torch.equal(rounded[0].indices_N, exact[0].indices_N), "nothing was near"
    assert torch.equal(ours[0].indices_N, exact[0].indices_N)
    torch.testing.assert_close(ours[0].sample_entropy.double(), exact[0].sample_entropy, rtol=1e-3, atol=1e-3)
    for coarse, found, wanted in zip(rounded[1], ours[1], exact[1], strict=True):
        assert float((coarse.double() - wanted).norm()) > 0.1 * float(wanted.norm())
        assert float((found.double() - wanted).norm()) < 0.01 * float(wanted.norm())


def _entropy_gradients(form: Any, z: torch.Tensor, codebook: torch.Tensor, config: QuantizerConfig) -> tuple[Any, ...]:
    """From values that were rounded to z's dtype, computed in fp32 at the least."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    z, codebook = (x.to(dtype, copy=True).requires_grad_() for x in (z, codebook))
    out = form(z, codebook, config)
    return out, torch.autograd.grad(out.entropy_loss, [z, codebook])


def _products(monkeypatch: pytest.MonkeyPatch, scale: float, backend: str) -> float:
    """Products of N·K·D that a step does, in whole tiles, tl.dot's and torch's."""
    done = 0
    dot, multiply = interpreter.InterpreterBuilder.create_dot, triton_backend.product_into

    def counted_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        nonlocal done
        done += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    def counted_product(out: Any, a: Any, b: Any, *rest: Any, **options: Any) -> None:
        nonlocal done
        done += a.shape[0] * a.shape[1] * b.shape[1]
        multiply(out, a, b, *rest, **options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted_dot)
    monkeypatch.setattr(triton_backend, "product_into", counted_product)
    monkeypatch.setattr(tiled_backend, "product_into", counted_product)
    monkeypatch.setattr(tiles, "CANDIDATES", 16)
    _run(quantize, (16, 160, 16), scale, backend=backend, logit_precision="bf16", entropy_temperature=0.01)
    monkeypatch.undo()
    return done / (16 * 160 * 16)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts what the interpreter does")
def test_a_step_does_6_products_of_tokens_codes_and_dimensions_and_8_with_flat_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _products(monkeypatch, 1.0, "triton") == 6
    # All 160 codes have about the same probability, more than a list holds.
    assert _products(monkeypatch, 1e-5, "triton") == 8
    assert flops.TRITON_PRODUCTS == 6


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_a_step_of_the_cublas_backend_does_5_products(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _products(monkeypatch, scale, "cublas") == flops.STEP_PRODUCTS == 5


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU has an order of its own")
@pytest.mark.usefixtures("few_candidates")
@pytest.mark.parametrize("backend", ["triton", "cublas"])
def test_the_order_in_which_programs_run_changes_no_bit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = interpreter.interpreter_builder
    plain = builder.set_grid_idx
    found = []
    for moved in (lambda x, n: x, lambda x, n: n - 1 - x):

        def permuted(*at: int, moved: Any = moved) -> None:
            plain(*(moved(x, n) for x, n in zip(at, builder.grid_dim, strict=True)))

        monkeypatch.setattr(builder, "set_grid_idx", permuted)
        out, grads = _mixed(quantize, backend=backend, logit_precision="bf16")
        found.append([*(value for value in out), *grads])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def _shards(rank: int, world: int) -> list[torch.Tensor]:
    tiles.CANDIDATES = 4
    g = torch.Generator().manual_seed(5)
    z_all, upstream_all = torch.randn(24, 20, generator=g) * torch.logspace(-3, 1, 24)[:, None], torch.ones(24, 20)
    codebook = torch.randn(104, 20, generator=g)
    tokens, share = 24 // world, 104 // world
    mine = slice(rank * tokens, (rank + 1) * tokens)
    z, rows = z_all[mine].clone().requires_grad_(), codebook[rank * share : (rank + 1) * share].clone().requires_grad_()
    config = QuantizerConfig(codebook_size=104, dim=20, backend="triton", logit_precision="fp32")
    out = quantize(z, rows, config, Shards(dist.group.WORLD))
    ((out.z_q_ND * upstream_all[mine]).sum() + out.entropy_loss / world).backward()
    assert z.grad is not None
    assert rows.grad is not None
    return [out.indices_N, out.entropy_loss.detach().reshape(1), z.grad, rows.grad]


@pytest.mark.distributed
def test_shards_with_flat_and_peaked_tokens_equal_the_whole() -> None:
    """Each shard makes lists of its own codes, and may find flat what another does not."""
    (whole,) = run_ranks(_shards, 1)
    for world in (2, 4):
        ranks = run_ranks(_shards, world)
        index, entropy, grad_z, grad_rows = (torch.cat(parts) for parts in zip(*ranks, strict=True))
        assert torch.equal(index, whole[0])
        torch.testing.assert_close(entropy.mean(), whole[1][0], rtol=1e-5, atol=1e-5)
        assert float((grad_z - whole[2]).norm()) < 1e-4 * float(whole[2].norm())
        assert float((grad_rows - whole[3]).norm()) < 1e-4 * float(whole[3].norm())


def test_auto_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiles.Chip("a small chip", "sm_89", 99 << 10)
    monkeypatch.setattr(tiles, "chip", lambda device: small)
    monkeypatch.setattr(
        tiles, "_needs", lambda name, precision, dim, tile, arch: Needs((100 if dim == 8 else 90) << 10, 128, 0)
    )
    _obstacle.cache_clear()
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose("auto", cpu, torch.float32, 256) == "tiled"
    assert choose("auto", cuda, torch.float32, 512) == "triton"
    assert choose("auto", cuda, torch.float64, 256) == "tiled"
    assert describe("auto", cuda, torch.float32, 256, "bf16") == "triton (bf16 products)"
    # What fits nowhere here is a tile of few dimensions: only the words are of interest.
    assert choose("auto", cuda, torch.float32, 8) == "cublas"
    assert choose("cublas", cuda, torch.float32, 256) == "cublas"
    said = describe("auto", cuda, torch.float32, 8, "tf32")
    assert said == (
        "cublas (tf32 products), since triton has no tile of its kernel 'sums' (tf32, 8 dimensions) for the 99 KiB of "
        "shared memory of a small chip"
    )
    assert describe("tiled", cuda, torch.float32, 256, "bf16") == "tiled (tf32 products)"
    assert describe("cublas", cuda, torch.float32, 256, "bf16") == "cublas (tf32 products)"
    assert describe("auto", cuda, torch.float64, 256, "fp32") == (
        "tiled (fp32 products), since triton computes in fp32, not torch.float64"
    )
    assert describe("auto", cpu, torch.float32, 256, "bf16") == "tiled"
    with pytest.raises(UserError, match=r"no tile of its kernel 'best'.*use auto or tiled"):
        choose("triton", cuda, torch.float32, 8, "fp32", "best")
    _obstacle.cache_clear()


def test_of_tiles_that_fit_the_first_without_spills_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = tiles.Chip("a chip", "sm_80", 163 << 10)
    first, second, third, _ = tiles.offered("sums", 256)
    found = {first: Needs(200 << 10, 128, 0), second: Needs(90 << 10, 255, 40), third: Needs(80 << 10, 255, 0)}
    monkeypatch.setattr(tiles, "_needs", lambda name, precision, dim, tile, arch: found.get(tile))
    assert list(tiles.fitting("sums", "bf16", 256, chip)) == [(second, False), (third, True)]
    tiles._first.cache_clear()
    assert tiles._first("sums", "bf16", 256, chip, 128) == third
    del found[third]
    tiles._first.cache_clear()
    assert tiles._first("sums", "bf16", 256, chip, 128) == second
    tiles._first.cache_clear()


def test_a_runs_tiles_stay_where_another_compiler_would_choose_others(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = tiles.Chip("a chip", "sm_80", 163 << 10)
    monkeypatch.setattr(tiles, "chip", lambda device: chip)
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    monkeypatch.setattr(tiles, "_needs", lambda *what: Needs(1 << 10, 128, 0))
    cuda = torch.device("cuda")
    tiles._first.cache_clear()
    monkeypatch.setattr(tiles, "_settled", {})
    record = tiles.settle({}, "bf16", 256, cuda)
    assert len(record) == len(tiles.KERNELS) + len(tiles.LIST_KERNELS)
    assert record["soft_codes sm_80 bf16 256"][1] <= record["sums sm_80 bf16 256"][1]
    # The compiler now needs more for the first tile.
    first = tiles.Tile(*record["sums sm_80 bf16 256"])
    monkeypatch.setattr(tiles, "_needs", lambda name, precision, dim, tile, arch: Needs(1, 9, 8 * (tile == first)))
    tiles._first.cache_clear()
    monkeypatch.setattr(tiles, "_settled", {})
    assert tiles.chosen("sums", "bf16", 256, cuda) != first
    assert tiles.settle(json.loads(json.dumps(record)), "bf16", 256, cuda) == record
    assert tiles.chosen("sums", "bf16", 256, cuda) == first
    tiles._first.cache_clear()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_adds_at_its_own_rows_alone_and_spreads_what_is_not_its_own(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibq_scale.quantize.collectives.rank_in", lambda group: rank)
    index, g = torch.tensor([0, 5, 5, 3, 7, 0]), torch.arange(12.0).view(6, 2)
    grad = torch.ones(4, 2)
    add_at_owned(grad, index, g, None)
    whole = torch.zeros(8, 2).index_add_(0, index, g)
    assert torch.equal(grad, 1 + whole[4 * rank : 4 * rank + 4])
