"""The search of the best code of each token, for `encode` and VQ.

A coarse product (fp32, or bf16 where faster) finds every code with a possibly best score, by a bound on the product's
rounding. Several such codes are scored again in fp64. So the answer does not depend on the device, the tile, the batch
around a token, the coarse precision or the number of shards. The lowest index wins a tie.

Bound: a product of width D, summed in any order in precision u, is off by at most γ Σ|z_d c_d| ≤ γ ‖z‖ ‖c‖ with
γ = D u / (1 − D u) (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). u is taken twice as large, since
tensor cores truncate. Rounding both operands to bf16 adds 2 u_b + u_b², u_b = 2^-8.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from ibq_scale.quantize.backend import choose
from ibq_scale.quantize.collectives import Group, exchange_uneven, gather_uneven, rank_in, size_of
from ibq_scale.quantize.product import Precision, product_into
from ibq_scale.quantize.quantized import not_finite
from ibq_scale.quantize.tiled_backend import best_codes, scratch, tile_tokens

UNIT_BF16 = 2.0**-8
# Rows with more possible winners than this are scored whole in fp64: a token of zeros ties with every code.
MOST_CANDIDATES = 64
# Codebook converted to fp64 at once for those rows.
WHOLE_CHUNK = 16_384


class Score(Enum):
    """The quantity to maximize."""

    DOT = "dot"
    """z·c: IBQ."""
    DISTANCE = "distance"
    """z·c − ‖c‖²/2: the nearest code (VQ)."""


class Found(NamedTuple):
    """`index_N` int64: the best code of this rank's tokens. `rescored`: tokens of the group decided in fp64 (0-dim)."""

    index_N: Tensor
    rescored: Tensor


def best_rows(
    z_ND: Tensor,
    rows_KD: Tensor,
    score: Score,
    *,
    coarse: Precision,
    backend: str = "auto",
    tile_bytes: int | None = None,
    group: Group = None,
    sizes: list[int] | None = None,
) -> Found:
    """Global index of the best code of this rank's tokens (N, D), exact for the fp32 (or fp64) values given.

    With a group, `rows_KD` are this rank's rows and `sizes` the ranks' numbers of tokens (None: all equal).
    """
    sizes = sizes or [z_ND.shape[0]] * size_of(group)
    if not any(sizes):
        return Found(z_ND.new_empty(0, dtype=torch.int64), z_ND.new_zeros((), dtype=torch.int64))
    z_MD = gather_uneven(z_ND, sizes, group)
    if choose(backend, z_MD.device, z_MD.dtype, z_MD.shape[1], coarse, "best") == "triton":
        scorer = _Scorer(z_MD, rows_KD, score, in_bf16=coarse == "bf16")
        index_M, ambiguous_M = _search_by_kernel(scorer, tile_bytes)
    else:
        in_bf16 = coarse == "bf16" and z_MD.is_cuda and z_MD.dtype == torch.float32
        scorer = _Scorer(z_MD, rows_KD, score, in_bf16=in_bf16)
        index_M, ambiguous_M = _search_by_tile(scorer, tile_bytes)
    rescored = ambiguous_M.sum()
    if group is None:
        return Found(index_M, rescored)
    # Shards are compared by exact scores: else a code's shard could decide. Each rank gets those of its own tokens: all
    # tokens' of all shards would be W² N of them.
    top_WN = exchange_uneven(scorer.exact(torch.arange(len(z_MD), device=z_MD.device), index_M), sizes, group)
    codes = rows_KD.shape[0]
    index_WN = exchange_uneven(index_M + rank_in(group) * codes, sizes, group)
    best_N = torch.where(top_WN == top_WN.amax(dim=0), index_WN, size_of(group) * codes).amin(dim=0)
    return Found(best_N, rescored)


def _search_by_kernel(scorer: _Scorer, tile_bytes: int | None) -> tuple[Tensor, Tensor]:
    """As `_search_by_tile`. The kernel gives the best code of each part of the codes, and the second best score."""
    from ibq_scale.quantize.triton_backend import best_and_second

    precision: Precision = "bf16" if scorer.in_bf16 else "fp32"
    index_PM, top_PM, second_PM = best_and_second(scorer.z_MD, scorer.rows_KD, scorer.offset_K, precision)
    top_M, part_M = top_PM.max(dim=0)
    index_M = index_PM.gather(0, part_M[None])[0]
    least_M = top_M - scorer.slack_M
    possible_PM = top_PM >= least_M
    # A part with two possible codes names only one of them: such tokens are searched again, by tile.
    crowded_M = (second_PM >= least_M).any(dim=0)
    ambiguous_M = crowded_M | (possible_PM.sum(dim=0) > 1)
    tokens = (ambiguous_M & ~crowded_M).nonzero().flatten()
    if len(tokens):
        possible, code = possible_PM[:, tokens].T, index_PM[:, tokens].T
        index_M[tokens] = _best_pair(scorer, tokens, possible, code)
    tokens = crowded_M.nonzero().flatten()
    if len(tokens):
        index_M[tokens] = _search_by_tile(scorer.of(tokens), tile_bytes)[0]
    return index_M, ambiguous_M


def _search_by_tile(scorer: _Scorer, tile_bytes: int | None) -> tuple[Tensor, Tensor]:
    """Index within the shard, and a mask of the tokens with several possible codes."""
    tokens, codes = len(scorer.z_MD), len(scorer.rows_KD)
    step = tile_tokens(codes, tile_bytes, scorer.z_MD, 1)
    indices, ambiguous = [], []
    with scratch(codes * min(step, tokens), scorer.z_MD) as flat:
        for start in range(0, tokens, step):
            block = slice(start, min(start + step, tokens))
            width = block.stop - block.start
            S_KB = flat[: codes * width].view(codes, width)
            scorer.scores_into(S_KB, block)
            index_B, ambiguous_B = _coarse(S_KB, scorer.slack_M[block])
            # The only wait for a GPU: the host needs the number of ambiguous tokens.
            places = ambiguous_B.nonzero().flatten()
            if len(places):
                index_B[places] = _decide(scorer, S_KB[:, places].T, places + start)
            indices.append(index_B)
            ambiguous.append(ambiguous_B)
    return torch.cat(indices), torch.cat(ambiguous)


def _coarse(S_KB: Tensor, slack_B: Tensor) -> tuple[Tensor, Tensor]:
    """The best code of each token by coarse scores, and whether another may be better still."""
    top, index = best_codes(S_KB)
    # The second best without a sort: the best is taken out, and put back for later readers.
    S_KB.scatter_(0, index[None], -torch.inf)
    second = S_KB.amax(dim=0)
    S_KB.scatter_(0, index[None], top[None])
    return index, second >= top - slack_B


def _decide(scorer: _Scorer, S_AK: Tensor, tokens_A: Tensor) -> Tensor:
    """The best code of ambiguous tokens, by fp64 scores of all codes within the slack of the coarse best."""
    least_A = S_AK.amax(dim=1) - scorer.slack_M[tokens_A]
    possible_AK = S_AK.ge(least_A[:, None])
    few = possible_AK.sum(dim=1) <= MOST_CANDIDATES
    index_A = torch.empty_like(tokens_A)
    index_A[few] = _best_pair(scorer, tokens_A[few], possible_AK[few], None)
    if not bool(few.all()):
        index_A[~few] = scorer.whole_rows(tokens_A[~few])
    return index_A


def _best_pair(scorer: _Scorer, tokens: Tensor, possible_AP: Tensor, code_AP: Tensor | None) -> Tensor:
    """Each token's best code by fp64 score among the possible ones. With code_AP None, place p stands for code p."""
    place, p = possible_AP.nonzero(as_tuple=True)
    code = p if code_AP is None else code_AP[place, p]
    exact = scorer.exact(tokens[place], code)
    best = exact.new_full((len(tokens),), -torch.inf).scatter_reduce(0, place, exact, "amax")
    beyond = len(scorer.rows_KD)
    winners = torch.where(exact == best[place], code, beyond)
    return torch.full_like(tokens, beyond).scatter_reduce(0, place, winners, "amin")


class _Scorer:
    """Scores of tokens against this shard's codes: coarse by tile, exact by pair, and the slack between them."""

    def __init__(self, z_MD: Tensor, rows_KD: Tensor, score: Score, *, in_bf16: bool) -> None:
        self.z_MD = z_MD
        self.rows_KD = rows_KD
        self.in_bf16 = in_bf16
        self.score = score
        norm_K = torch.linalg.vector_norm(rows_KD, dim=1)
        self.offset_K = rows_KD.square().sum(dim=1).mul_(-0.5) if score is Score.DISTANCE else None
        self._narrow_rows_KD = rows_KD.bfloat16() if in_bf16 and rows_KD.is_cuda else None
        # The offset is a sum of D like the product, halved exactly. Adding it is one operation more. eps is 2 u.
        rounding = (rows_KD.shape[1] + 1) * torch.finfo(rows_KD.dtype).eps
        gamma = rounding / (1 - rounding)
        operands = 2 * UNIT_BF16 + UNIT_BF16**2 if in_bf16 else 0.0
        product = torch.linalg.vector_norm(z_MD, dim=1) * norm_K.max()
        size = product if self.offset_K is None else product - self.offset_K.min()
        # Twice the bound: the winner may be too low and the other too high. The norms are rounded too: a little more.
        self.slack_M = 2 * (gamma * size + operands * (1 + gamma) * product) * (1 + 2 * rounding)
        if not self.slack_M.is_cuda and not bool(self.slack_M.isfinite().all()):
            raise not_finite(z_MD, rows_KD)

    def of(self, tokens: Tensor) -> _Scorer:
        """The same for some of the tokens, by fp32 products. They separate most codes with equal bf16 scores."""
        return _Scorer(self.z_MD[tokens], self.rows_KD, self.score, in_bf16=False)

    def scores_into(self, S_KB: Tensor, block: slice) -> None:
        z_BD = self.z_MD[block]
        if self._narrow_rows_KD is not None:
            S_KB.copy_(torch.mm(self._narrow_rows_KD, z_BD.bfloat16().T, out_dtype=torch.float32))
        else:
            product_into(S_KB, self.rows_KD, z_BD.T, "fp32")
        if self.offset_K is not None:
            S_KB.add_(self.offset_K[:, None])

    def exact(self, token_Q: Tensor, code_Q: Tensor) -> Tensor:
        """fp64 scores of pairs (token, code). A score does not depend on the device or on the other pairs."""
        parts = []
        for token, code in zip(torch.split(token_Q, WHOLE_CHUNK), torch.split(code_Q, WHOLE_CHUNK), strict=True):
            z, c = self.z_MD[token].double(), self.rows_KD[code].double()
            parts.append((z * c if self.score is Score.DOT else z * c - c * c / 2).sum(dim=1))
        return torch.cat(parts) if parts else self.z_MD.new_empty(0, dtype=torch.float64)

    def whole_rows(self, rows: Tensor) -> Tensor:
        """The best code of tokens with very many possible codes, over all codes in fp64."""
        best = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=rows.device)
        index = torch.zeros_like(rows)
        for i, token in enumerate(rows):
            for start in range(0, len(self.rows_KD), WHOLE_CHUNK):
                code = torch.arange(start, min(start + WHOLE_CHUNK, len(self.rows_KD)), device=rows.device)
                top, place = self.exact(token.expand(len(code)), code).max(dim=0)
                better = top > best[i]
                index[i] = torch.where(better, place + start, index[i])
                best[i] = torch.where(better, top, best[i])
        return index
