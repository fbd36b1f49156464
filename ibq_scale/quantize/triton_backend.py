"""The IBQ function by Triton's product kernels (kernels.py), with cuBLAS for the last two products.

Products of N·K·D: S and e^S C forward, S, g Cᵀ, ∂L/∂S C and ∂L/∂Sᵀ z backward: 6. Flat tokens need S twice more, for q̄
and π.

Rounding of the operands moves S/τ by nats, and with it the entropy loss and the codes. So a token's code and its
softmax(S/τ) come from fp64 scores of its candidates: all codes that could be the best, or could hold more than e^−20/K
of the best's share, by a bound on the rounding. The others hold less than e^−20 together, below fp32's resolution.

A block of e^S or of ∂L/∂S, (M, codes of a block), has at most `BLOCK_BYTES`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_scale.quantize import tiles
from ibq_scale.quantize.backend_interface import (
    BackwardInputs,
    Candidates,
    Codebook,
    PartSums,
    RowStatistics,
    Segments,
    combine,
)
from ibq_scale.quantize.product import Precision, product_into
from ibq_scale.quantize.tiles import Split, Tile, ceil_div, chosen, interpreted, launch

BLOCK_BYTES, BLOCK_UNIT = 512 << 20, 1024
# ln of a candidate's least share of softmax(S/τ), relative to the best code's, times K.
CUT = -20.0
# Relative rounding of an operand: to nearest in bf16, truncated in tf32. Rounding of e^S and of exp, as an error of S.
OPERAND = {"fp32": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-8}
SLACK = {"fp32": 2.0**-16, "tf32": 2.0**-16, "bf16": 2.0**-7}
# Probabilities are added as integers in this unit: no order changes the sum.
FIXED = 2.0**-40
# Exponents are clamped to it: exp must not overflow.
LARGEST = 80.0


class _CandidateLists(NamedTuple):
    """The state of the search for candidates. Counts, lists and `best_M`, the best score by its lower bound, change.

    `size_M` times a code's norm bounds the error of a score.
    """

    candidates: Candidates
    rivals_MR: Tensor
    rival_count_M: Tensor
    best_M: Tensor
    size_M: Tensor
    norm_K: Tensor
    margin: float


class TritonBackend:
    """See `backend_interface.Backend`."""

    def __init__(self, temperature: float, precision: Precision) -> None:
        self.temperature = temperature
        self.precision = precision

    def rounded(self, rows_KD: Tensor) -> Tensor:
        if self.precision != "bf16":
            return rows_KD.new_empty((0, rows_KD.shape[1]))
        # The interpreter multiplies no bf16 and gets the rounded values as fp32.
        narrow = rows_KD.bfloat16()
        return narrow.float() if interpreted() else narrow

    def empty_candidates(self, z_MD: Tensor) -> Candidates:
        codes_ML, scores_ML = (
            z_MD.new_empty((z_MD.shape[0], tiles.CANDIDATES), dtype=dtype) for dtype in (torch.int32, torch.float32)
        )
        return Candidates(codes_ML, scores_ML, z_MD.new_zeros(z_MD.shape[0], dtype=torch.int32))

    def sums(self, z_MD: Tensor, codebook: Codebook) -> tuple[PartSums, Candidates]:
        M, K = len(z_MD), len(codebook.rows_KD)
        z, c = self._operand(z_MD), codebook.operand
        lists = self._lists(z_MD, codebook.rows_KD)
        block = self._block(M, z)
        firsts = list(range(0, K, block))
        sums = combine([self._sums(z, c[at : at + block], at, lists) for at in firsts], firsts, self.temperature)
        return self._rescored(z_MD, codebook.rows_KD, sums, lists), lists.candidates

    def _lists(self, z_MD: Tensor, rows_KD: Tensor) -> _CandidateLists:
        """Empty lists, with the bound of search.py."""
        rounding = (rows_KD.shape[1] + 1) * torch.finfo(torch.float32).eps
        gamma, operand = rounding / (1 - rounding), OPERAND[self.precision]
        share = (gamma + (2 * operand + operand**2) * (1 + gamma)) * (1 + 2 * rounding)
        size_M: Tensor = torch.linalg.vector_norm(z_MD, dim=1) * share
        norm_K: Tensor = torch.linalg.vector_norm(rows_KD, dim=1)
        candidates = self.empty_candidates(z_MD)
        rivals_MR = candidates.codes_ML.new_empty((len(z_MD), tiles.RIVALS))
        margin = self.temperature * (math.log(len(rows_KD)) - CUT)
        best_M = torch.full_like(size_M, -torch.inf)
        return _CandidateLists(
            candidates, rivals_MR, torch.zeros_like(candidates.count_M), best_M, size_M, norm_K, margin
        )

    def _sums(self, z: Tensor, c: Tensor, first: int, lists: _CandidateLists) -> PartSums:
        """Sums of a block of codes. Its candidates are added to the lists."""
        (M, D), K = z.shape, len(c)
        tile = self._tile("sums", z)
        split = Split.of(K, ceil_div(M, tile.tokens), z.device)
        index = torch.empty((split.parts, M), dtype=torch.int32, device=z.device)
        top, total, total_tau, weighted = _floats(z, 4, split.parts, M)
        (tile_top,) = _floats(z, 1, ceil_div(K, tile.codes), M)
        weights_MK = z.new_empty((M, K))
        launch("sums", tile, (ceil_div(M, tile.tokens), split.parts), D, self.precision,
            z, c, index, top, total, total_tau, weighted, tile_top, weights_MK, M, K, split.size,
            1.0 / self.temperature)  # fmt: skip
        columns = zip(index.long(), top, total, total_tau, weighted, strict=True)
        sums = combine([PartSums(*column, None) for column in columns], [0] * split.parts, self.temperature)
        norm_K = lists.norm_K[first : first + K]
        norm_T = F.pad(norm_K, (0, -K % tile.codes)).view(-1, tile.codes).amax(dim=1)
        torch.maximum(lists.best_M, (tile_top - norm_T[:, None] * lists.size_M).amax(dim=0), out=lists.best_M)
        launch("candidates", self._tile("candidates", z), (M,), D, self.precision,
            weights_MK, tile_top, norm_T, lists.size_M, lists.best_M, lists.candidates.codes_ML,
            lists.candidates.count_M, lists.rivals_MR, lists.rival_count_M, M, K, first, lists.margin,
            SLACK[self.precision])  # fmt: skip
        return replace(sums, soft_codes_MD=self._soft_codes(tile, c, sums.top, tile_top, weights_MK))

    def _soft_codes(self, of_sums: Tile, c: Tensor, top: Tensor, tile_top: Tensor, weights_MK: Tensor) -> Tensor:
        (M, K), D = weights_MK.shape, c.shape[1]
        tile = self._tile("soft_codes", c, most_codes=of_sums.codes)
        columns = ceil_div(D, tile.dims)
        split = Split.of(K, ceil_div(M, tile.tokens) * columns, c.device)
        (parts_PMD,) = _floats(c, 1, split.parts, M, D)
        launch("soft_codes", tile, (ceil_div(M, tile.tokens), split.parts, columns), D, self.precision,
            c, tile_top, weights_MK, top, parts_PMD, M, K, split.size, of_sums.codes)  # fmt: skip
        return parts_PMD.sum(dim=0)

    def _rescored(self, z_MD: Tensor, rows_KD: Tensor, sums: PartSums, lists: _CandidateLists) -> PartSums:
        """The sums with the codes, and S/τ of all but flat tokens, by the scores of candidates."""
        (M, D), candidates = z_MD.shape, lists.candidates
        index = torch.empty_like(candidates.count_M)
        top, total_tau, weighted = _floats(z_MD, 3, M)
        tile = self._tile("rescore", z_MD)
        launch("rescore", tile, (M,), D, self.precision,
            z_MD, rows_KD, candidates.codes_ML, candidates.count_M, lists.rivals_MR, lists.rival_count_M,
            candidates.scores_ML, index, top, total_tau, weighted, 1.0 / self.temperature)  # fmt: skip
        flat_M = candidates.count_M < 0
        shift = sums.top - top
        # Where rounding is off by more than fp32's exponents hold, nothing but the code is known.
        scale = shift.clamp(max=LARGEST).exp()
        shift_tau = (shift / self.temperature).clamp(max=LARGEST)
        scale_tau = shift_tau.exp()
        coarse_weighted = scale_tau * (sums.weighted + shift_tau * sums.total_tau)
        assert sums.soft_codes_MD is not None
        return PartSums(
            index.long(),
            top,
            scale * sums.total,
            torch.where(flat_M, scale_tau * sums.total_tau, total_tau),
            torch.where(flat_M, coarse_weighted, weighted),
            sums.soft_codes_MD * scale[:, None],
        )

    def means(
        self, z_MD: Tensor, codebook: Codebook, statistics: RowStatistics, segments: Segments, candidates: Candidates
    ) -> Tensor:
        K, D = codebook.rows_KD.shape
        z, c = self._operand(z_MD), codebook.operand
        q_ML, places_ML = self._candidate_q(candidates, statistics, K)
        fixed_ML = (q_ML.double() / FIXED).round_().long()
        mean_GK = z_MD.new_empty((len(segments), K))
        for number, segment in enumerate(segments):
            M = segment.stop - segment.start
            tile = self._tile("means", z)
            split = Split.of(M, ceil_div(K, tile.codes), z.device)
            (parts_PK,) = _floats(z, 1, split.parts, K)
            launch("means", tile, (ceil_div(K, tile.codes), split.parts), D, self.precision,
                z[segment], c, candidates.count_M[segment], statistics.top[segment], statistics.log_sum_tau[segment],
                parts_PK, M, K, split.size, 1.0 / self.temperature)  # fmt: skip
            fixed_K = torch.zeros(K, dtype=torch.int64, device=z.device)
            fixed_K.scatter_add_(0, places_ML[segment].flatten(), fixed_ML[segment].flatten())
            mean_GK[number] = parts_PK.sum(dim=0) + fixed_K.double() * FIXED
        return mean_GK

    def row_sums(self, inputs: BackwardInputs) -> Tensor:
        assert inputs.entropy.batch_GK is not None
        K, D = inputs.codebook.rows_KD.shape
        z, c = self._operand(inputs.z_MD), inputs.codebook.operand
        q_ML, places_ML = self._candidate_q(inputs.candidates, inputs.statistics, K)
        pi_M = torch.empty_like(inputs.statistics.top)
        for number, segment in enumerate(inputs.segments):
            M = segment.stop - segment.start
            tile = self._tile("row_sums", z)
            split = Split.of(K, ceil_div(M, tile.tokens), z.device)
            (parts_PM,) = _floats(z, 1, split.parts, M)
            rows, batch_K = inputs.statistics.rows(segment), inputs.entropy.batch_GK[number]
            launch("row_sums", tile, (ceil_div(M, tile.tokens), split.parts), D, self.precision,
                z[segment], c, inputs.candidates.count_M[segment], rows.top, rows.log_sum_tau, batch_K, parts_PM, M, K,
                split.size, 1.0 / self.temperature)  # fmt: skip
            of_candidates_M = (q_ML[segment] * batch_K[places_ML[segment]]).sum(dim=1)
            pi_M[segment] = parts_PM.sum(dim=0) + of_candidates_M
        return pi_M

    def gradients(self, inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
        assert inputs.delta_M is not None
        K = len(inputs.codebook.rows_KD)
        z, g, c = self._operand(inputs.z_MD), self._operand(inputs.g_MD), inputs.codebook.operand
        grad_z_MD, grad_rows_KD = torch.empty_like(inputs.z_MD), torch.empty_like(inputs.codebook.rows_KD)
        pi_M = torch.zeros_like(inputs.delta_M) if inputs.pi_M is None else inputs.pi_M
        inputs = inputs._replace(pi_M=pi_M)
        for number, segment in enumerate(inputs.segments):
            block = self._block(segment.stop - segment.start, z)
            for first in range(0, K, block):
                part = slice(first, min(first + block, K))
                batch_K = z.new_zeros(part.stop - first, dtype=torch.float32)
                batch_K = batch_K if inputs.entropy.batch_GK is None else inputs.entropy.batch_GK[number, part]
                of_tokens = self._of_tokens(inputs, segment)
                dS_MK = self._slopes(inputs, of_tokens, segment, batch_K, z[segment], g[segment], c[part])
                product_into(grad_z_MD[segment], dS_MK, c[part], self.precision, accumulate=first > 0)
                self._add_candidates(inputs, of_tokens, segment, part, batch_K, dS_MK, grad_z_MD[segment])
                product_into(grad_rows_KD[part], dS_MK.T, z[segment], self.precision, accumulate=number > 0)
        return grad_z_MD, grad_rows_KD

    def _of_tokens(self, inputs: BackwardInputs, segment: slice) -> tuple[Tensor, ...]:
        """log l_τ, H, a and π of a segment."""
        rows = inputs.statistics.rows(segment)
        assert inputs.pi_M is not None
        return rows.log_sum_tau, rows.entropy, inputs.entropy.sample_M[segment].contiguous(), inputs.pi_M[segment]

    def _slopes(
        self, inputs: BackwardInputs, of_tokens: tuple[Tensor, ...], segment: slice, batch_K: Tensor, z: Tensor,
        g: Tensor, c: Tensor,
    ) -> Tensor:  # fmt: skip
        """∂L/∂S (M, K) of a segment and a block of codes, but for candidates' softmax(S/τ)."""
        assert inputs.delta_M is not None
        (M, D), K = z.shape, len(c)
        rows, (log_sum_tau, *rest) = inputs.statistics.rows(segment), of_tokens
        tile = self._tile("slopes", z)
        dS_MK = z.new_empty((M, K))
        launch("slopes", tile, (ceil_div(M, tile.tokens), ceil_div(K, tile.codes)), D, self.precision,
            z, c, g, inputs.candidates.count_M[segment], rows.top, rows.log_sum, log_sum_tau, rest[0], rest[1],
            inputs.delta_M[segment], rest[2], batch_K, dS_MK, M, K, 1.0 / self.temperature)  # fmt: skip
        return dS_MK

    def _add_candidates(
        self, inputs: BackwardInputs, of_tokens: tuple[Tensor, ...], segment: slice, part: slice, batch_K: Tensor,
        dS_MK: Tensor, grad_z_MD: Tensor,
    ) -> None:  # fmt: skip
        rows_KD, candidates = (
            inputs.codebook.rows_KD[part],
            Candidates(*(of_all[segment] for of_all in inputs.candidates)),
        )
        tile = self._tile("candidate_slopes", rows_KD)
        (M, K), D = dS_MK.shape, rows_KD.shape[1]
        launch("candidate_slopes", tile, (M,), D, self.precision,
            rows_KD, candidates.codes_ML, candidates.count_M, candidates.scores_ML,
            inputs.statistics.top[segment], *of_tokens, batch_K, dS_MK, grad_z_MD, K, part.start,
            1.0 / self.temperature)  # fmt: skip

    def _candidate_q(self, candidates: Candidates, statistics: RowStatistics, K: int) -> tuple[Tensor, Tensor]:
        """softmax(S/τ) of the lists (M, L) with their codes, int64. Empty places are 0 at codes of all kinds."""
        places_ML = torch.arange(candidates.codes_ML.numel(), device=candidates.count_M.device).view_as(
            candidates.codes_ML
        )
        live_ML = places_ML[0] < candidates.count_M[:, None]
        log_q_ML = (candidates.scores_ML - statistics.top[:, None]) / self.temperature - statistics.log_sum_tau[:, None]
        return torch.where(live_ML, log_q_ML.exp(), 0.0), torch.where(live_ML, candidates.codes_ML, places_ML % K)

    def _operand(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        narrow = self.rounded(x)
        return narrow if len(narrow) else x

    def _tile(self, kernel: str, like: Tensor, most_codes: int = 1 << 30) -> Tile:
        return chosen(kernel, self.precision, like.shape[1], like.device, most_codes)

    def _block(self, tokens: int, like: Tensor) -> int:
        """Codebook of a block."""
        return max(1, BLOCK_BYTES // (tokens * like.element_size()) // BLOCK_UNIT) * BLOCK_UNIT


def best_and_second(
    z_MD: Tensor, rows_KD: Tensor, offset_K: Tensor | None, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each part of the codes: the best code's index int64 (P, M), its score, and the second best score.

    Scores are z·c (+ offset) in the given precision. The second is −∞ in a part of one code.
    """
    M, (K, D) = len(z_MD), rows_KD.shape
    backend = TritonBackend(1.0, precision)
    tile = backend._tile("best", z_MD)
    split = Split.of(K, ceil_div(M, tile.tokens), z_MD.device)
    index = torch.empty((split.parts, M), dtype=torch.int32, device=z_MD.device)
    top, second = _floats(z_MD, 2, split.parts, M)
    offset_K = z_MD.new_zeros(K) if offset_K is None else offset_K
    launch("best", tile, (ceil_div(M, tile.tokens), split.parts), D, precision,
        backend._operand(z_MD), backend._operand(rows_KD), offset_K, index, top, second, M, K, split.size)  # fmt: skip
    return index.long(), top, second


def _floats(like: Tensor, number: int, *shape: int) -> tuple[Tensor, ...]:
    return torch.empty((number, *shape), dtype=torch.float32, device=like.device).unbind()
