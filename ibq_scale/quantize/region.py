"""Region VQ (StableVQ, arXiv 2609.26774): a codebook term with targets for codes without tokens, too.

All sets are over all ranks' tokens of a micro-batch:

    S  codes with a token. The target of each is the mean t of its tokens.
    A  codes without one, but chosen within the window: the last `region_window` tokens, by whole micro-batches.
    N  the rest. A source (a code with n > 1 tokens) gives its t to its q = ⌈n |N| / Σ n⌉ nearest codes of N. A code of
       N with several targets takes their mean, one without gets no loss.

    L = mean over codes with a target of mean‖c − sg(t)‖²

A micro-batch of an accumulating step has a term of its own, and the step has their mean. Memory is O((N + K)·D) and one
tile of sources × codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.collectives import (
    Group,
    Shards,
    add_at_owned,
    gather_rows,
    gather_uneven,
    rank_in,
    size_of,
    sum_over,
)
from ibq_scale.quantize.product import product_into
from ibq_scale.quantize.tiled_backend import tile_tokens


def initial_ages(settings: QuantizerConfig, codes: int, device: torch.device | str = "cpu") -> Tensor:
    """The state of the window for `codes` rows of a shard: int64 (K,), tokens since each code was last chosen.

    It counts up to `region_window`. All codes start there, as never chosen.
    """
    return torch.full((codes,), settings.region_window, dtype=torch.int64, device=device)


def region_loss(
    z_ND: Tensor, rows_KD: Tensor, indices_N: Tensor, settings: QuantizerConfig, shards: Shards, age_K: Tensor | None
) -> Tensor:
    """L (0-dim), the same on all ranks, with gradient to this rank's rows (K, D) alone.

    z (N, D) are this rank's tokens, `indices_N` their codes. `age_K` is the window's state (`initial_ages`), updated in
    place. Without it the window is empty. Backward gives the gradient of the *sum* over the group's ranks of
    their losses, as in `quantize`. Collective.
    """
    with torch.no_grad():
        targets = _targets(z_ND.detach(), rows_KD.detach(), indices_N, settings, shards, age_K)
    loss: Tensor = _CodebookTerm.apply(rows_KD, targets.mean_KD, targets.has_K, shards.group)
    return loss


class _Targets(NamedTuple):
    """Targets (K, D) of this rank's rows where `has_K` is true."""

    mean_KD: Tensor
    has_K: Tensor


def _targets(
    z_ND: Tensor, rows_KD: Tensor, indices_N: Tensor, settings: QuantizerConfig, shards: Shards, age_K: Tensor | None
) -> _Targets:
    group = shards.group
    mean_KD, count_K = _means(z_ND, indices_N, len(rows_KD), shards)
    chosen_K = count_K > 0
    free_K = ~chosen_K
    sources_K = count_K > 1
    source_tokens_K = torch.where(sources_K, count_K, 0)
    tokens = count_K.sum()
    if age_K is not None:
        (tokens,) = sum_over([tokens], group)
        age_K.add_(tokens).clamp_(max=settings.region_window).masked_fill_(chosen_K, 0)
        free_K &= age_K >= settings.region_window
    # A wait for a GPU: the host needs the numbers of free codes and of sources, of all shards.
    counts_W3 = gather_rows(torch.stack([free_K.sum(), sources_K.sum(), source_tokens_K.sum()])[None], group).tolist()
    free_W, sources_W, tokens_W = (list(column) for column in zip(*counts_W3, strict=True))
    if not sum(free_W) or not sum(sources_W):
        return _Targets(mean_KD, chosen_K)
    places_S, places_F = _places(sources_K, sources_W[rank_in(group)]), _places(free_K, free_W[rank_in(group)])
    target_SD = gather_uneven(mean_KD[places_S], sources_W, group)
    quota_S = -(-gather_uneven(count_K[places_S], sources_W, group) * sum(free_W) // sum(tokens_W))
    # Sources of like quotas share a tile. A stable sort is the same on every rank.
    order_S = quota_S.argsort(descending=True, stable=True)
    claims = _Claims(rows_KD[places_F], max(free_W), group, settings.tile_bytes)
    given_FD, times_F = claims.of(target_SD[order_S], quota_S[order_S])
    mean_KD[places_F] = given_FD / times_F.clamp(min=1)[:, None].to(given_FD.dtype)
    return _Targets(mean_KD, chosen_K.index_put((places_F,), times_F > 0))


def _means(z_ND: Tensor, indices_N: Tensor, codes: int, shards: Shards) -> tuple[Tensor, Tensor]:
    """Mean of all ranks' tokens of each code of this rank (K, D), zero without any, and their number (K,)."""
    sizes = shards.sizes or [len(z_ND)] * size_of(shards.group)
    counted_NE = torch.cat([z_ND, z_ND.new_ones((len(z_ND), 1))], dim=1)
    counted_ME = gather_uneven(counted_NE, sizes, shards.group)
    indices_M = gather_uneven(indices_N, sizes, shards.group)
    sums_KE = counted_ME.new_zeros((codes, counted_ME.shape[1]))
    add_at_owned(sums_KE, indices_M, counted_ME, shards.group)
    (sums_KE,) = sum_over([sums_KE], shards.replicas)
    count_K = sums_KE[:, -1]
    return sums_KE[:, :-1] / count_K.clamp(min=1)[:, None], count_K.long()


def _places(mask_K: Tensor, number: int) -> Tensor:
    """Where a mask is true, int64 (number,). On a GPU `nonzero` would wait to learn the number."""
    return torch.nonzero_static(mask_K, size=number).flatten()


class _Claims:
    """Free codes (F, D) of this shard, and the sources' claims on the nearest of all shards' free codes."""

    def __init__(self, free_FD: Tensor, most_free: int, group: Group, tile_bytes: int | None) -> None:
        self.free_FD, self.most_free, self.group, self.tile_bytes = free_FD, most_free, group, tile_bytes
        # ‖t − c‖² = ‖t‖² − 2 (t·c − ‖c‖²/2): a source's nearest codes have its largest scores.
        self.offset_F = free_FD.square().sum(dim=1) / -2

    def of(self, target_SD: Tensor, quota_S: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the targets given to each code of this shard (F, D), and their number (F,). Quotas descend."""
        given_FD, times_F = torch.zeros_like(self.free_FD), torch.zeros_like(self.offset_F)
        quotas = quota_S.tolist()
        for block in self._blocks(quotas):
            listed = min(quotas[block.start], self.most_free)
            claimed_BF = self._nearest(target_SD[block], quota_S[block], listed).to(given_FD.dtype)
            product_into(given_FD, claimed_BF.T, target_SD[block], "fp32", accumulate=True)
            times_F += claimed_BF.sum(dim=0)
        return given_FD, times_F

    def _blocks(self, quotas: list[int]) -> Iterator[slice]:
        """Slices of sources within the tile's budget, the same on every rank: scores, lists and claims."""
        start = 0
        while start < len(quotas):
            lists = size_of(self.group) * min(quotas[start], self.most_free)
            stop = start + tile_tokens(max(self.most_free, lists), self.tile_bytes, self.free_FD, 4)
            yield slice(start, min(stop, len(quotas)))
            start = stop

    def _nearest(self, target_BD: Tensor, quota_B: Tensor, listed: int) -> Tensor:
        """bool (B, F): this shard's codes among each source's quota of nearest ones. The lowest index wins a tie.

        Each shard lists its best `listed` scores. The list of the shards together has the last score of each quota.
        """
        score_BF = self.offset_F.new_empty((len(target_BD), len(self.offset_F)))
        product_into(score_BF, target_BD, self.free_FD.T, "fp32")
        score_BF += self.offset_F
        top = score_BF.topk(min(listed, score_BF.shape[1]), dim=1).values
        top = torch.nn.functional.pad(top, (0, listed - top.shape[1]), value=-torch.inf)
        top_WBL = gather_rows(top[None], self.group)
        sorted_BL = top_WBL.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values
        least_B1 = sorted_BL.gather(1, quota_B[:, None] - 1)
        room_B = quota_B - (sorted_BL > least_B1).sum(dim=1)
        ties_WB = (top_WBL == least_B1).sum(dim=2)
        room_B1 = (room_B - ties_WB[: rank_in(self.group)].sum(dim=0))[:, None]
        tied_BF = score_BF == least_B1
        return (score_BF > least_B1) | (tied_BF & (tied_BF.cumsum(dim=1, dtype=torch.int32) <= room_B1))


class _CodebookTerm(torch.autograd.Function):
    """Mean over all ranks' codes with a target of mean‖c − t‖². Each rank's loss has the whole of it."""

    @staticmethod
    def forward(ctx: Any, rows_KD: Tensor, target_KD: Tensor, has_K: Tensor, group: Group) -> Tensor:
        difference_KD = torch.where(has_K[:, None], rows_KD - target_KD, 0.0)
        squares, count = sum_over([difference_KD.square().sum(), has_K.sum().to(rows_KD.dtype)], group)
        ctx.save_for_backward(difference_KD, count)
        ctx.group = group
        return squares / (count * rows_KD.shape[1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        difference_KD, count = ctx.saved_tensors
        (total,) = sum_over([upstream[0]], ctx.group)
        return difference_KD * (2 * total / (count * difference_KD.shape[1])), None, None, None
