"""The Triton kernels against the dense oracle: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.errors import UserError
from ibq_scale.quantize import tiles
from ibq_scale.quantize.backend import _obstacle, choose, describe
from ibq_scale.quantize.compiled import Needs
from ibq_scale.quantize.ibq import ibq_dense
from ibq_scale.quantize.quantizer import find, quantize

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
def test_equal_to_the_oracle_at_any_size(size: tuple[int, int, int], scale: float, changes: dict[str, Any]) -> None:
    expected, expected_grads = _run(ibq_dense, size, scale, **changes)
    found, grads = _run(quantize, size, scale, backend="triton", **changes)
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


def test_auto_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiles.Chip("a small chip", "sm_89", 99 << 10)
    needed = {64: 90 << 10, 16: 100 << 10}
    monkeypatch.setattr(tiles, "chip", lambda device: small)
    monkeypatch.setattr(tiles, "_needs", lambda name, precision, dim, tile, arch: Needs(needed[tile.dims], 128, 0))
    _obstacle.cache_clear()
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose("auto", cpu, torch.float32, 256) == "tiled"
    assert choose("auto", cuda, torch.float32, 512) == "triton"
    assert choose("auto", cuda, torch.float64, 256) == "tiled"
    assert describe("auto", cuda, torch.float32, 256, "bf16") == "triton (bf16 products)"
    # What fits nowhere here is a tile of few dimensions: only the words are of interest.
    assert choose("auto", cuda, torch.float32, 8) == "tiled"
    said = describe("auto", cuda, torch.float32, 8, "tf32")
    assert said == (
        "tiled, since triton has no tile of its kernel 'sums' (tf32, 8 dimensions) for the 99 KiB of shared memory of "
        "a small chip"
    )
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
