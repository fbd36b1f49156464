"""The IBQ function in plain torch, for CPUs and any GPU: tile by tile.

A tile is a block of *columns* of Sᵀ = C zᵀ, (K, B): all codes of this shard beside as many tokens as the budget holds.
Whole softmaxes are in memory, so nothing needs a second pass: one product forward and four backward, against six of the
dense form. Products of Sᵀ are a quarter faster on CPUs (MKL) than of S. Elementwise work goes through a tile in pieces
of the cache's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from ibq_scale.quantize.backend_interface import BackwardInputs, Candidates, Codebook, PartSums, RowStatistics, Segments
from ibq_scale.quantize.product import Precision, product_into

# Buffers of the size of a tile, alive at once in the backward pass: S and g Cᵀ.
LIVE_BUFFERS = 2
CPU_BUDGET, GPU_BUDGET = 128 << 20, 1 << 30
# Fewer tokens would read the codebook from memory more often than the arithmetic hides. 2 buffers × 32 tokens are 64
# floats a code, well below the codebook's own gradient at the usual widths.
LEAST_TOKENS = 32
CPU_PIECE, GPU_PIECE = 2 << 20, 128 << 20
# exp of torch's CPU build takes ten times as long as exp2 where results underflow, and most of a softmax over 262,144
# codes does: exponentials are taken in base 2.
LOG2_E = 1.0 / math.log(2.0)
RUN = 256


def tile_tokens(codes: int, tile_bytes: int | None, like: Tensor, buffers: int) -> int:
    """Tokens a tile, by a budget for so many buffers at once. None chooses the budget by device."""
    a_token = buffers * codes * like.element_size()
    if tile_bytes is not None:
        return max(1, tile_bytes // a_token)
    return max(LEAST_TOKENS, (GPU_BUDGET if like.is_cuda else CPU_BUDGET) // a_token)


def blocks(segments: Segments, step: int) -> Iterator[tuple[int, slice]]:
    """Slices of at most `step` tokens within each segment, with its number. An empty segment has one empty slice."""
    for number, segment in enumerate(segments):
        for start in range(segment.start, max(segment.stop, segment.start + 1), step):
            yield number, slice(start, min(start + step, segment.stop))


def best_codes(S_KB: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each column and the first place where it stands: `S.max(dim=0)`, the place found in two steps.

    torch's amax is vectorised and its max with indices is not: many times the time on CPUs.
    """
    codes = len(S_KB)
    if codes < 4 * RUN:
        top, index = S_KB.max(dim=0)
        return top, index
    whole = codes // RUN * RUN
    top, run = S_KB[:whole].view(-1, RUN, S_KB.shape[1]).amax(dim=1).max(dim=0)
    places = run * RUN + torch.arange(RUN, device=S_KB.device)[:, None]
    index = run * RUN + S_KB.gather(0, places).argmax(dim=0)
    if whole == codes:
        return top, index
    rest_top, rest = S_KB[whole:].max(dim=0)
    later = rest_top > top
    return torch.where(later, rest_top, top), torch.where(later, rest + whole, index)


_kept: dict[torch.dtype, Tensor] = {}


@contextmanager
def scratch(size: int, like: Tensor) -> Iterator[Tensor]:
    """Uninitialised (size,), of like's dtype and device.

    On CPUs the last one is kept for the next call: new pages, cleared by the system, cost a tenth of a step. On GPUs
    torch's allocator keeps it.
    """
    flat = None if like.is_cuda else _kept.pop(like.dtype, None)
    if flat is None or flat.numel() < size:
        # A tensor made in inference mode, by an evaluation between two training steps, could not be written later.
        with torch.inference_mode(False):
            flat = torch.empty(size, dtype=like.dtype, device=like.device)
    try:
        yield flat[:size]
    finally:
        if not like.is_cuda:
            _kept[like.dtype] = flat


class TiledBackend:
    """See `backend_interface.WholeRowBackend`."""

    def __init__(self, temperature: float, precision: Precision, tile_bytes: int | None) -> None:
        self.temperature = temperature
        self.precision = precision
        self.tile_bytes = tile_bytes

    def rounded(self, rows_KD: Tensor) -> Tensor:
        return rows_KD.new_empty((0, rows_KD.shape[1]))

    def sums(self, z_MD: Tensor, codebook: Codebook) -> tuple[PartSums, Candidates]:
        return self._forward(z_MD, codebook.rows_KD, (slice(0, z_MD.shape[0]),), None), self.empty_candidates(z_MD)

    def sums_and_means(self, z_MD: Tensor, codebook: Codebook, segments: Segments) -> tuple[PartSums, Tensor]:
        mean_GK = z_MD.new_zeros((len(segments), codebook.rows_KD.shape[0]))
        return self._forward(z_MD, codebook.rows_KD, segments, mean_GK), mean_GK

    def empty_candidates(self, z_MD: Tensor) -> Candidates:
        return Candidates(
            z_MD.new_empty((0, 0), dtype=torch.int32), z_MD.new_empty((0, 0)), z_MD.new_empty(0, dtype=torch.int32)
        )

    def _forward(self, z_MD: Tensor, rows_KD: Tensor, segments: Segments, mean_GK: Tensor | None) -> PartSums:
        """Adds to Σ q where it is given. Otherwise rows are not whole, and the sums have Σ exp(S − top) C."""
        soft_codes_MD = torch.zeros_like(z_MD) if mean_GK is None else None
        parts: list[tuple[Tensor, ...]] = []
        with self._tile(z_MD, rows_KD) as tile:
            for number, block in blocks(segments, tile.step):
                S = tile.products(rows_KD, z_MD[block])
                mean_K = None if mean_GK is None else mean_GK[number]
                soft_codes_BD = None if soft_codes_MD is None else soft_codes_MD[block]
                parts.append(self._block_sums(tile, S, mean_K, rows_KD, soft_codes_BD))
        index, top, total, total_tau, weighted = (torch.cat(column) for column in zip(*parts, strict=True))
        return PartSums(index, top, total, total_tau, weighted, soft_codes_MD)

    def _block_sums(
        self, tile: BlockScratch, S: Tensor, mean_K: Tensor | None, rows_KD: Tensor, soft_codes_BD: Tensor | None
    ) -> tuple[Tensor, ...]:
        """`PartSums` of a block without its last field. Adds to Σ q and to soft_codes_BD. Overwrites S."""
        top, index = best_codes(S)
        total, total_tau, weighted = top.new_zeros((3, len(top))).unbind()
        for piece, work in tile.pieces(S):
            x = S[piece].sub_(top)
            total += torch.mul(x, LOG2_E, out=work).exp2_().sum(dim=0)
            if soft_codes_BD is not None:
                product_into(soft_codes_BD, work.T, rows_KD[piece], self.precision, accumulate=True)
            e = torch.exp2(x.mul_(LOG2_E / self.temperature), out=work)
            total_tau += e.sum(dim=0)
            weighted += x.mul_(e).sum(dim=0)
            x.copy_(e)
        if mean_K is not None:
            mean_K.addmv_(S, total_tau.reciprocal())
        return index, top, total, total_tau, weighted / LOG2_E

    def means(
        self, z_MD: Tensor, codebook: Codebook, statistics: RowStatistics, segments: Segments, candidates: Candidates
    ) -> Tensor:
        mean_GK = z_MD.new_zeros((len(segments), codebook.rows_KD.shape[0]))
        with self._tile(z_MD, codebook.rows_KD) as tile:
            for number, block in blocks(segments, tile.step):
                S = tile.products(codebook.rows_KD, z_MD[block])
                self._add_means(tile, S, statistics.rows(block), mean_GK[number])
        return mean_GK

    def _add_means(self, tile: BlockScratch, S: Tensor, rows: RowStatistics, mean_K: Tensor) -> None:
        for piece, q in self._q(tile, S, rows):
            mean_K[piece] += q.sum(dim=1)

    def row_sums(self, inputs: BackwardInputs) -> Tensor:
        pi_M = torch.zeros_like(inputs.statistics.top)
        assert inputs.entropy.batch_GK is not None
        with self._tile(inputs.z_MD, inputs.codebook.rows_KD) as tile:
            for number, block in blocks(inputs.segments, tile.step):
                S = tile.products(inputs.codebook.rows_KD, inputs.z_MD[block])
                pi_M[block] = self._pi(tile, S, inputs.statistics.rows(block), inputs.entropy.batch_GK[number])
        return pi_M

    def _pi(self, tile: BlockScratch, S: Tensor, rows: RowStatistics, batch_K: Tensor) -> Tensor:
        pi_B = torch.zeros_like(rows.top)
        for piece, q in self._q(tile, S, rows):
            pi_B += batch_K[piece] @ q
        return pi_B

    def _q(self, tile: BlockScratch, S: Tensor, rows: RowStatistics) -> Iterator[tuple[slice, Tensor]]:
        """softmax(S/τ) of a block of tokens, piece by piece."""
        for piece, work in tile.pieces(S):
            log_q = S[piece].sub_(rows.top).mul_(1.0 / self.temperature).sub_(rows.log_sum_tau)
            yield piece, torch.mul(log_q, LOG2_E, out=work).exp2_()

    def gradients(self, inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
        grad_z_MD, grad_rows_KD = torch.empty_like(inputs.z_MD), torch.empty_like(inputs.codebook.rows_KD)
        with self._tile(inputs.z_MD, inputs.codebook.rows_KD, LIVE_BUFFERS) as tile:
            for number, block in blocks(inputs.segments, tile.step):
                dS_KB = self._grad_scores(tile, inputs, number, block)
                product_into(grad_z_MD[block], dS_KB.T, inputs.codebook.rows_KD, self.precision)
                later = block.start > 0
                product_into(grad_rows_KD, dS_KB, inputs.z_MD[block], self.precision, accumulate=later)
        return grad_z_MD, grad_rows_KD

    def _grad_scores(self, tile: BlockScratch, inputs: BackwardInputs, number: int, block: slice) -> Tensor:
        """∂L/∂S of a block of tokens, (K, B). The first walk over the pieces makes δ and π, the second uses them.

        Softmaxes stay unnormalised, e = p L and e_τ = q L_τ with L = exp(l): 1/L goes into g before its product, and
        1/L_τ into vectors. So G = g Cᵀ / L becomes e ⊙ G, then ∂L/∂S. S becomes x = (S − m) log₂e / τ, and e_τ = 2ˣ.
        """
        B = block.stop - block.start
        rows, sample = inputs.statistics.rows(block), inputs.entropy.sample_M[block]
        per_sum, per_sum_tau = (-rows.log_sum).exp(), (-rows.log_sum_tau).exp()
        S, G = tile.both_products(inputs.codebook.rows_KD, inputs.z_MD[block], inputs.g_MD[block] * per_sum[:, None])
        r_K = None if inputs.entropy.batch_GK is None else inputs.entropy.batch_GK[number]
        delta, pi = rows.top.new_zeros((2, B)).unbind()
        for piece, work in tile.pieces(S):
            x = S[piece].sub_(rows.top)
            G[piece].mul_(torch.mul(x, LOG2_E, out=work).exp2_())
            if inputs.delta_M is None:
                delta += G[piece].sum(dim=0)
            x.mul_(LOG2_E / self.temperature)
            if r_K is not None and inputs.pi_M is None:
                pi += r_K[piece] @ torch.exp2(x, out=work)
        delta = delta if inputs.delta_M is None else inputs.delta_M[block]
        pi = pi * per_sum_tau if inputs.pi_M is None else inputs.pi_M[block]
        # q/τ (−a (log q + H) + b r − π), log q = x/log₂e − l_τ, as e_τ (x·slope + shift + r·scale).
        scale = per_sum_tau / self.temperature
        slope = sample * scale / -LOG2_E
        shift = (sample * (rows.log_sum_tau - rows.entropy) - pi) * scale
        for piece, work in tile.pieces(S):
            x, dS = S[piece], G[piece]
            dS.addcmul_(torch.mul(x, self.temperature, out=work).exp2_(), delta * per_sum, value=-1.0)
            e_tau = torch.exp2(x, out=work)
            inner = x.mul_(slope).add_(shift)
            if r_K is not None:
                inner.addcmul_(r_K[piece, None], scale)
            dS.addcmul_(inner, e_tau)
        return G

    @contextmanager
    def _tile(self, z_MD: Tensor, rows_KD: Tensor, buffers: int = 1) -> Iterator[BlockScratch]:
        codes = len(rows_KD)
        step = min(tile_tokens(codes, self.tile_bytes, z_MD, buffers), max(1, len(z_MD)))
        with scratch(codes * buffers * step, z_MD) as flat:
            yield BlockScratch(step, codes, flat, self.precision)


class BlockScratch:
    """S, and G = g Cᵀ, of a block of at most `step` tokens, and scratch for pieces of them."""

    def __init__(self, step: int, codes: int, flat: Tensor, precision: Precision) -> None:
        self.step = step
        self._codes = codes
        self._flat = flat
        self._precision = precision
        piece = (GPU_PIECE if flat.is_cuda else CPU_PIECE) // (step * flat.element_size())
        self._piece = max(1, min(piece, codes))

    @cached_property
    def _work(self) -> Tensor:
        return self._flat.new_empty(self._piece * self.step)

    def products(self, rows_KD: Tensor, x_BD: Tensor) -> Tensor:
        """C xᵀ (K, B) into the scratch."""
        B = len(x_BD)
        out = self._flat[: self._codes * B].view(self._codes, B)
        product_into(out, rows_KD, x_BD.T, self._precision)
        return out

    def both_products(self, rows_KD: Tensor, z_BD: Tensor, g_BD: Tensor) -> tuple[Tensor, Tensor]:
        """S and G by one product, each (K, B) with strides (2 B, 1)."""
        S_and_G = self.products(rows_KD, torch.cat([z_BD, g_BD]))
        return S_and_G[:, : len(z_BD)], S_and_G[:, len(z_BD) :]

    def pieces(self, S_KB: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Ranges of codes, each with uninitialised scratch of the shape of its part of S."""
        B = S_KB.shape[1]
        for start in range(0, self._codes, self._piece):
            piece = slice(start, min(start + self._piece, self._codes))
            codes = piece.stop - piece.start
            yield piece, self._work[: codes * B].view(codes, B)
