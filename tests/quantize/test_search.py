"""The exact search: what no precision, tile or company of a token may change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ibq_scale.quantize.search import Score, best_rows


def _expected(z_ND: Tensor, codebook_KD: Tensor, score: Score) -> Tensor:
    """Scores pair by pair: a matrix product may break a tie by its own rounding."""
    pairs = z_ND[:, None].double() * codebook_KD.double()
    if score is Score.DISTANCE:
        pairs = pairs - 0.5 * codebook_KD.double().square()
    return pairs.sum(dim=2).argmax(dim=1)


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 9),
    codes=st.integers(1, 40),
    dim=st.integers(1, 6),
    copies=st.booleans(),
    spread=st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 1e4]),
    tile_bytes=st.integers(1, 3000),
    score=st.sampled_from(list(Score)),
    seed=st.integers(0, 99),
)
def test_exact_for_near_equal_and_equal_codes(
    tokens: int, codes: int, dim: int, copies: bool, spread: float, tile_bytes: int, score: Score, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, dim, generator=g)
    codebook = torch.randn(1, dim, generator=g) + spread * torch.randn(codes, dim, generator=g)
    if copies:
        codebook[codes // 2 :] = codebook[: codes - codes // 2].clone()
    found = best_rows(z, codebook, score, coarse="fp32", tile_bytes=tile_bytes)
    assert torch.equal(found.index_N, _expected(z, codebook, score))


def test_a_token_that_ties_with_every_code_takes_the_first() -> None:
    z, codebook = torch.zeros(2, 4), torch.randn(5000, 4)
    found = best_rows(z, codebook, Score.DOT, coarse="fp32")
    assert found.index_N.tolist() == [0, 0]
    assert int(found.rescored) == 2


def test_a_token_gets_the_same_code_in_any_batch_and_tile() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(40, 64, generator=g)
    near = torch.randn(8, 64, generator=g).repeat(600, 1)
    codebook = near * (1 + 1e-7 * torch.randint(-3, 4, near.shape, generator=g))
    whole = best_rows(z, codebook, Score.DOT, coarse="fp32")
    assert int(whole.rescored) > 20, "the case is too easy"
    for batch, tile_bytes in ((1, None), (7, 50_000), (40, 200_000)):
        parts = [best_rows(part, codebook, Score.DOT, coarse="fp32", tile_bytes=tile_bytes) for part in z.split(batch)]
        assert torch.equal(torch.cat([part.index_N for part in parts]), whole.index_N)


def test_few_tokens_of_a_random_codebook_need_a_second_look() -> None:
    g = torch.Generator().manual_seed(0)
    found = best_rows(torch.randn(500, 64, generator=g), torch.randn(4096, 64, generator=g), Score.DOT, coarse="fp32")
    assert int(found.rescored) < 10


@pytest.mark.parametrize(("bad", "named"), [("z", "z holds"), ("codebook", "the codebook holds")])
def test_non_finite_input_is_named(bad: str, named: str) -> None:
    z, codebook = torch.randn(4, 3), torch.randn(8, 3)
    (z if bad == "z" else codebook)[1, 1] = float("inf")
    with pytest.raises(ValueError, match=named):
        best_rows(z, codebook, Score.DOT, coarse="fp32")
