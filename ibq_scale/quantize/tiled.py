"""IBQ in linear memory: forward and backward, whole or sharded, without an N×K tensor.

A tile is a block of *rows* of S = z Cᵀ, as many tokens as fit the budget beside all K codes. With whole rows at hand
the softmaxes need no second pass: one product forward and four backward, against six of the dense form. Where the
codebook is sharded, a rank's rows are pieces, and their sums are combined between two passes.

Per token i (all fp32): m = max_k S_ik, l = Σ exp(S − m), l_τ = Σ exp((S − m)/τ), H = entropy of softmax(S/τ).
Backward, with g = ∂L/∂z_q, p = softmax(S), q = softmax(S/τ) and r = w_b ∂(−H_b)/∂q̄ (design: "The quantizer, exactly"):
    ∂L/∂S = p ⊙ (g Cᵀ − rowsum(p ⊙ g Cᵀ)) + q/τ ⊙ (−a_i w_s (log q + H) + b (r − rowsum(q ⊙ r)))
    ∂L/∂z = ∂L/∂S · C,   ∂L/∂C = ∂L/∂Sᵀ · z,   ∂L/∂C[i*] += g
with a_i and b the upstream gradient of the entropy loss over the number of tokens that its means run over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.collectives import (
    Group,
    add_at_owned,
    gather_rows,
    owned_codes,
    rank_in,
    scatter_sum_rows,
    size_of,
    sum_over,
)
from ibq_scale.quantize.terms import batch_entropy_of, batch_entropy_slope

# Buffers of a tile's size alive at once in the backward pass.
LIVE_BUFFERS = 3


@dataclass
class RowStatistics:
    """Per token: index and max of S, log Σ exp(S − m), log Σ exp((S − m)/τ), entropy of softmax(S/τ). Each (M,)."""

    index: Tensor
    top: Tensor
    log_sum: Tensor
    log_sum_tau: Tensor
    entropy: Tensor


def tile_rows(codes: int, tile_bytes: int, itemsize: int) -> int:
    """Tokens a tile: the budget covers all buffers that live at once."""
    return max(1, tile_bytes // (LIVE_BUFFERS * codes * itemsize))


def blocks(rows: int, step: int, segment: int) -> Iterator[slice]:
    """Slices of at most `step` rows that do not cross a multiple of `segment`."""
    for first in range(0, rows, segment):
        last = min(first + segment, rows)
        for start in range(first, last, step):
            yield slice(start, min(start + step, last))


class IBQFunction(torch.autograd.Function):
    """(z, this rank's rows of C) → (z_q, C[i*], entropy loss, indices, H_s, H_b); the last three without gradient.

    With a group, backward gives the gradient of the *sum* over its ranks of their losses: ∂/∂z for this rank's
    tokens, ∂/∂C complete for this rank's rows.
    """

    @staticmethod
    def forward(ctx: Any, z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, group: Group) -> tuple[Tensor, ...]:
        z_MD = gather_rows(z_ND, group)
        segment = z_MD.shape[0] if settings.entropy_scope == "global" else z_ND.shape[0]
        statistics, mean_GK = _forward_passes(z_MD, rows_KD, settings, segment, group)
        hard_ND = scatter_sum_rows(owned_codes(statistics.index, rows_KD, group), group)
        mine = slice(rank_in(group) * z_ND.shape[0], (rank_in(group) + 1) * z_ND.shape[0])
        sample_entropy = statistics.entropy[mine].mean()
        (batch_entropy_G,) = sum_over([batch_entropy_of(mean_GK)], group)
        batch_entropy = batch_entropy_G[0 if len(batch_entropy_G) == 1 else rank_in(group)]
        entropy_loss = settings.sample_entropy_weight * sample_entropy - settings.batch_entropy_weight * batch_entropy
        indices_N = statistics.index[mine].clone()
        ctx.save_for_backward(z_MD, rows_KD, mean_GK, *vars(statistics).values())
        ctx.settings, ctx.group, ctx.segment = settings, group, segment
        ctx.mark_non_differentiable(indices_N, sample_entropy, batch_entropy)
        return hard_ND, hard_ND.clone(), entropy_loss, indices_N, sample_entropy, batch_entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        z_MD, rows_KD, mean_GK, *saved = ctx.saved_tensors
        group: Group = ctx.group
        grad_z_q, grad_hard, grad_entropy = upstream[:3]
        both_M2D = gather_rows(torch.stack([grad_z_q, grad_z_q + grad_hard], dim=1), group)
        pull = _EntropyPull.of(grad_entropy, mean_GK, ctx.settings, z_MD.shape[0], group)
        statistics = RowStatistics(*saved)
        g_MD = both_M2D[:, 0].contiguous()
        grad_z_MD, grad_rows_KD = _backward_passes(z_MD, rows_KD, g_MD, statistics, pull, ctx, group)
        add_at_owned(grad_rows_KD, statistics.index, both_M2D[:, 1], group)
        return scatter_sum_rows(grad_z_MD, group), grad_rows_KD, None, None


@dataclass
class _EntropyPull:
    """What the entropy loss does to S: a (M,) for the sample entropy, b·r (G, K) for the batch entropy.

    G is 1 where the mean runs over the whole group's batch, else one a rank.
    """

    sample_M: Tensor
    batch_GK: Tensor

    @staticmethod
    def of(grad: Tensor, mean_GK: Tensor, settings: QuantizerConfig, tokens: int, group: Group) -> _EntropyPull:
        grad_W = gather_rows(grad.reshape(1), group)
        each = tokens // len(grad_W)
        sample_M = grad_W.repeat_interleave(each) * (settings.sample_entropy_weight / each)
        over_tokens_G = grad_W.sum(0, keepdim=True) / tokens if len(mean_GK) == 1 else grad_W / each
        slope_GK = batch_entropy_slope(mean_GK).mul_(settings.batch_entropy_weight)
        return _EntropyPull(sample_M, slope_GK.mul_(over_tokens_G[:, None]))


def _forward_passes(
    z_MD: Tensor, rows_KD: Tensor, settings: QuantizerConfig, segment: int, group: Group
) -> tuple[RowStatistics, Tensor]:
    """Statistics of every token over the whole codebook, and q̄ (G, K) over this rank's rows."""
    codes = rows_KD.shape[0]
    step = tile_rows(codes, settings.tile_bytes, z_MD.element_size())
    buffers = _Buffers(step, codes, z_MD)
    mean_GK = z_MD.new_zeros((-(-z_MD.shape[0] // segment), codes))
    parts: list[tuple[Tensor, ...]] = []
    for block in blocks(z_MD.shape[0], step, segment):
        S = buffers.product(z_MD[block], rows_KD, 0)
        top, index = S.max(dim=1)
        S.sub_(top[:, None])
        work = buffers.take(block, 1)
        total = torch.exp(S, out=work).sum(dim=1)
        S.mul_(1.0 / settings.entropy_temperature)
        total_tau = torch.exp(S, out=work).sum(dim=1)
        if group is None:
            mean_GK[block.start // segment] += total_tau.reciprocal() @ work
        parts.append((index, top, total, total_tau, S.mul_(work).sum(dim=1)))
    index, top, total, total_tau, weighted = (torch.cat(column) for column in zip(*parts, strict=True))
    if group is not None:
        index, top, total, total_tau, weighted = _combine(
            index, top, total, total_tau, weighted, settings, codes, group
        )
    log_sum_tau = total_tau.log()
    statistics = RowStatistics(index, top, total.log(), log_sum_tau, log_sum_tau - weighted / total_tau)
    if group is not None:
        _mean_pass(z_MD, rows_KD, statistics, settings, segment, mean_GK, buffers)
    _check_finite(statistics, z_MD, rows_KD)
    return statistics, mean_GK.div_(segment)


def _mean_pass(
    z_MD: Tensor,
    rows_KD: Tensor,
    statistics: RowStatistics,
    settings: QuantizerConfig,
    segment: int,
    mean_GK: Tensor,
    buffers: _Buffers,
) -> None:
    """q̄ of a shard needs sums over all shards first, so S is made a second time."""
    for block in blocks(z_MD.shape[0], buffers.step, segment):
        S = buffers.product(z_MD[block], rows_KD, 0)
        S.sub_(statistics.top[block, None]).mul_(1.0 / settings.entropy_temperature)
        mean_GK[block.start // segment] += S.sub_(statistics.log_sum_tau[block, None]).exp_().sum(dim=0)


def _combine(
    index: Tensor,
    top: Tensor,
    total: Tensor,
    total_tau: Tensor,
    weighted: Tensor,
    settings: QuantizerConfig,
    codes: int,
    group: Group,
) -> tuple[Tensor, ...]:
    """Sums of the shards rescaled to the common maximum; the lowest index wins a tie."""
    ranks = size_of(group)
    global_index = index + rank_in(group) * codes
    index_WM = gather_rows(global_index[None], group)
    top_WM, total_WM, tau_WM, weighted_WM = gather_rows(
        torch.stack([top, total, total_tau, weighted])[None], group
    ).unbind(1)
    best = top_WM.amax(dim=0)
    index = torch.where(top_WM == best, index_WM, ranks * codes).amin(dim=0)
    shift_WM = top_WM - best
    shift_tau_WM = shift_WM / settings.entropy_temperature
    scale_tau_WM = shift_tau_WM.exp()
    # Σ e^{x}(x) with x measured from the common maximum: x = x_local + shift.
    weighted = scale_tau_WM * weighted_WM + torch.where(scale_tau_WM > 0, scale_tau_WM * shift_tau_WM, 0.0) * tau_WM
    return index, best, (shift_WM.exp() * total_WM).sum(0), (scale_tau_WM * tau_WM).sum(0), weighted.sum(0)


def _backward_passes(
    z_MD: Tensor,
    rows_KD: Tensor,
    g_MD: Tensor,
    statistics: RowStatistics,
    pull: _EntropyPull,
    ctx: Any,
    group: Group,
) -> tuple[Tensor, Tensor]:
    """∂L/∂z (M, D), this shard's part of the sum, and ∂L/∂C (K, D) without the selected rows' own gradient."""
    settings: QuantizerConfig = ctx.settings
    codes = rows_KD.shape[0]
    tile = _Tile(z_MD, rows_KD, g_MD, statistics, pull, settings, ctx.segment)
    grad_z_MD, grad_rows_KD = torch.empty_like(z_MD), torch.zeros_like(rows_KD)
    step = tile_rows(codes, settings.tile_bytes, z_MD.element_size())
    buffers = _Buffers(step, codes, z_MD)
    delta_M = pulled_M = None
    if group is not None:
        parts = [tile.row_sums(block, buffers) for block in blocks(z_MD.shape[0], step, ctx.segment)]
        delta, pulled = (torch.cat(column) for column in zip(*parts, strict=True))
        delta_M, pulled_M = sum_over([delta, pulled], group)
    for block in blocks(z_MD.shape[0], step, ctx.segment):
        sums = None if delta_M is None or pulled_M is None else (delta_M[block], pulled_M[block])
        dS = tile.grad_scores(block, buffers, sums)
        torch.mm(dS, rows_KD, out=grad_z_MD[block])
        grad_rows_KD.addmm_(dS.T, z_MD[block])
    return grad_z_MD, grad_rows_KD


@dataclass
class _Tile:
    """The inputs of the backward pass, and what a block of rows makes of them."""

    z_MD: Tensor
    rows_KD: Tensor
    g_MD: Tensor
    statistics: RowStatistics
    pull: _EntropyPull
    settings: QuantizerConfig
    segment: int

    def _shifted_and_upstream(self, block: slice, buffers: _Buffers) -> tuple[Tensor, Tensor, Tensor]:
        """S − m, g Cᵀ and softmax(S) of the block."""
        S = buffers.product(self.z_MD[block], self.rows_KD, 0).sub_(self.statistics.top[block, None])
        G = buffers.product(self.g_MD[block], self.rows_KD, 1)
        p = torch.sub(S, self.statistics.log_sum[block, None], out=buffers.take(block, 2)).exp_()
        return S, G, p

    def _log_q(self, S: Tensor, block: slice) -> Tensor:
        return S.mul_(1.0 / self.settings.entropy_temperature).sub_(self.statistics.log_sum_tau[block, None])

    def _batch_pull(self, block: slice) -> Tensor:
        return self.pull.batch_GK[block.start // self.segment]

    def row_sums(self, block: slice, buffers: _Buffers) -> tuple[Tensor, Tensor]:
        """This shard's part of rowsum(p ⊙ g Cᵀ) and rowsum(q ⊙ b r)."""
        S, G, p = self._shifted_and_upstream(block, buffers)
        delta = G.mul_(p).sum(dim=1)
        q = self._log_q(S, block).exp_()
        return delta, q @ self._batch_pull(block)

    def grad_scores(self, block: slice, buffers: _Buffers, sums: tuple[Tensor, Tensor] | None) -> Tensor:
        """∂L/∂S of the block; `sums` are the row sums where they run over several shards."""
        S, dS, p = self._shifted_and_upstream(block, buffers)
        delta = torch.linalg.vecdot(dS, p) if sums is None else sums[0]
        dS.sub_(delta[:, None]).mul_(p)
        log_q = self._log_q(S, block)
        q = torch.exp(log_q, out=p)
        r_K = self._batch_pull(block)
        pulled = q @ r_K if sums is None else sums[1]
        sample = self.pull.sample_M[block, None]
        inner = log_q.add_(self.statistics.entropy[block, None]).mul_(-sample).add_(r_K).sub_(pulled[:, None])
        return dS.addcmul_(inner, q, value=1.0 / self.settings.entropy_temperature)


class _Buffers:
    """Tile-sized scratch, allocated once a pass: a fresh tensor a block would cost more than the arithmetic."""

    def __init__(self, step: int, codes: int, like: Tensor) -> None:
        self.step = step
        self._flat = [like.new_empty(0) for _ in range(LIVE_BUFFERS)]
        self._size = min(step, like.shape[0]) * codes
        self._codes = codes

    def take(self, block: slice, which: int) -> Tensor:
        """Uninitialised (rows of the block, K)."""
        if not self._flat[which].numel():
            self._flat[which] = self._flat[which].new_empty(self._size)
        rows = block.stop - block.start
        return self._flat[which][: rows * self._codes].view(rows, self._codes)

    def product(self, a_BD: Tensor, rows_KD: Tensor, which: int) -> Tensor:
        """a Cᵀ into a buffer."""
        return torch.mm(a_BD, rows_KD.T, out=self.take(slice(0, a_BD.shape[0]), which))


def _check_finite(statistics: RowStatistics, z_MD: Tensor, rows_KD: Tensor) -> None:
    """On a GPU looking would wait for the device; there the trainer's look at the loss finds it."""
    if z_MD.device.type != "cpu" or bool(statistics.log_sum_tau.isfinite().all()):
        return
    guilty = "z" if not bool(z_MD.isfinite().all()) else "the codebook"
    if guilty == "the codebook" and bool(rows_KD.isfinite().all()):
        guilty = "z·codebook (overflow)"
    raise ValueError(f"quantizer input is not finite: {guilty} holds NaN or infinity")
