"""The interface of a backend of the IBQ function. No backend keeps an N×K tensor.

Per token i, in fp32 (fp64 for fp64 input): m = max_k S_ik, l = Σ exp(S − m), l_τ = Σ exp((S − m)/τ), H = entropy of
q = softmax(S/τ). With g = ∂L/∂z_q, p = softmax(S) and b r = the batch entropy's gradient at q̄ (design: "The quantizer,
exactly"):

    ∂L/∂S = p ⊙ (g Cᵀ − δ) + q/τ ⊙ (−a (log q + H) + b r − π)
    δ_i = rowsum(p ⊙ g Cᵀ) = g·(p C),   π_i = rowsum(q ⊙ b r)
    ∂L/∂z = ∂L/∂S · C,   ∂L/∂C = ∂L/∂Sᵀ · z

δ is a dot product with p C, a result of the forward pass. π needs the finished q̄, and so one more product S, except in
a whole-row backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from ibq_scale.quantize.collectives import exchange_uneven, gather_uneven

Segments = tuple[slice, ...]
"""Consecutive ranges of tokens, each with a q̄ of its own: one for all, or one a rank."""


@dataclass(frozen=True)
class PartSums:
    """Sums of M tokens over a part of the codebook, measured from the part's own maximum `top`.

    `index` counts within the part. `weighted` is Σ e^x x with x = (S − top)/τ. `soft_codes_MD` is Σ exp(S − top) C, or
    None in a whole-row backend.
    """

    index: Tensor
    top: Tensor
    total: Tensor
    total_tau: Tensor
    weighted: Tensor
    soft_codes_MD: Tensor | None


@dataclass(frozen=True)
class RowStatistics:
    """Per token: index and max of S, log Σ exp(S − m), log Σ exp((S − m)/τ), entropy of softmax(S/τ). Each (M,)."""

    index: Tensor
    top: Tensor
    log_sum: Tensor
    log_sum_tau: Tensor
    entropy: Tensor

    @staticmethod
    def of(sums: PartSums) -> RowStatistics:
        log_sum_tau = sums.total_tau.log()
        entropy = log_sum_tau - sums.weighted / sums.total_tau
        return RowStatistics(sums.index, sums.top, sums.total.log(), log_sum_tau, entropy)

    def rows(self, block: slice) -> RowStatistics:
        return RowStatistics(*(getattr(self, f.name)[block] for f in fields(self)))


class Codebook(NamedTuple):
    """This shard's rows (K, D), and the rows as products read them (`Backend.rounded`), empty where both are equal."""

    rows_KD: Tensor
    rounded_KD: Tensor

    @property
    def operand(self) -> Tensor:
        return self.rounded_KD if len(self.rounded_KD) else self.rows_KD


class Candidates(NamedTuple):
    """Each token's candidates: the codes with a share of softmax(S/τ), and their scores (M, L), and their number (M,).

    A count of −1 marks a flat token: it has more candidates than places. All are empty for a backend without lists.
    """

    codes_ML: Tensor
    scores_ML: Tensor
    count_M: Tensor


class EntropyGradient(NamedTuple):
    """The entropy loss's part in ∂L/∂S: `sample_M` is a. `batch_GK` is b·r by segment, None without batch entropy."""

    sample_M: Tensor
    batch_GK: Tensor | None


class BackwardInputs(NamedTuple):
    """The inputs of the backward pass of one shard. δ and π are None for a whole-row backend, to be made from S."""

    z_MD: Tensor
    codebook: Codebook
    g_MD: Tensor
    statistics: RowStatistics
    entropy: EntropyGradient
    delta_M: Tensor | None
    pi_M: Tensor | None
    segments: Segments
    candidates: Candidates


class Backend(Protocol):
    """A backend. `temperature` is τ. z and the rows have one dtype, the statistics' own."""

    def rounded(self, rows_KD: Tensor) -> Tensor:
        """`Codebook.rounded_KD`, made once for forward and backward. Empty where products read the rows themselves."""

    def sums(self, z_MD: Tensor, codebook: Codebook) -> tuple[PartSums, Candidates]:
        """Sums over this shard with `soft_codes_MD`, and the candidates."""

    def empty_candidates(self, z_MD: Tensor) -> Candidates:
        """Empty lists for these tokens."""

    def means(
        self, z_MD: Tensor, codebook: Codebook, statistics: RowStatistics, segments: Segments, candidates: Candidates
    ) -> Tensor:
        """Σ_i q_ik (G, K) of each segment's tokens over this shard's codes."""

    def row_sums(self, inputs: BackwardInputs) -> Tensor:
        """π over this shard, (M,)."""

    def gradients(self, inputs: BackwardInputs) -> tuple[Tensor, Tensor]:
        """∂L/∂z (M, D), this shard's part of the sum, and ∂L/∂C (K, D) without the selected rows' own gradient."""


@runtime_checkable
class WholeRowBackend(Backend, Protocol):
    """A backend with whole rows of an unsharded S in memory. It needs no p C, δ and π."""

    def sums_and_means(self, z_MD: Tensor, codebook: Codebook, segments: Segments) -> tuple[PartSums, Tensor]:
        """Both in one pass, `soft_codes_MD` None."""


def combine(parts: list[PartSums], first_codes: list[int], temperature: float) -> PartSums:
    """Sums of parts rescaled to the common maximum, indices counted over all. The lowest index wins a tie.

    `first_codes` are the parts' first codes, ascending.
    """
    top_PM = torch.stack([p.top for p in parts])
    index_PM = torch.stack([p.index + first for p, first in zip(parts, first_codes, strict=True)])
    best = top_PM.amax(dim=0)
    beyond = torch.iinfo(torch.int64).max
    index = torch.where(top_PM == best, index_PM, beyond).amin(dim=0)
    shift_PM = top_PM - best
    scale_PM = shift_PM.exp()
    shift_tau_PM = shift_PM / temperature
    scale_tau_PM = shift_tau_PM.exp()
    total_tau_PM = torch.stack([p.total_tau for p in parts])
    # Σ e^x x with x measured from the common maximum is e^s (Σ e^x x + s Σ e^x) of the part, and 0 for s = −∞.
    moved_PM = torch.where(scale_tau_PM > 0, scale_tau_PM * shift_tau_PM, 0.0)
    weighted_PM = scale_tau_PM * torch.stack([p.weighted for p in parts]) + moved_PM * total_tau_PM
    soft_codes_MD = None
    if parts[0].soft_codes_MD is not None:
        soft_codes_MD = torch.zeros_like(parts[0].soft_codes_MD)
        for part, scale in zip(parts, scale_PM, strict=True):
            assert part.soft_codes_MD is not None
            soft_codes_MD.addcmul_(part.soft_codes_MD, scale[:, None])
    return PartSums(
        index,
        best,
        (scale_PM * torch.stack([p.total for p in parts])).sum(0),
        (scale_tau_PM * total_tau_PM).sum(0),
        weighted_PM.sum(0),
        soft_codes_MD,
    )


def combine_shards(
    sums: PartSums, codes: int, temperature: float, sizes: Sequence[int], group: dist.ProcessGroup
) -> PartSums:
    """`combine` over the shards of a group. Its ranks have `sizes` tokens.

    `soft_codes_MD` stays this shard's part of the sum, rescaled.

    Each rank combines the sums of its own tokens and gathers the results. The sums of all shards for all tokens, W·M
    rows, would be 25 GB at 1,024 ranks of 1,024 tokens.
    """
    parts_WNX = exchange_uneven(_packed(sums), sizes, group)
    own = combine([_unpacked(part) for part in parts_WNX], [rank * codes for rank in range(len(sizes))], temperature)
    whole = _unpacked(gather_uneven(_packed(own), sizes, group))
    soft_codes_MD = sums.soft_codes_MD
    if soft_codes_MD is not None:
        soft_codes_MD = soft_codes_MD * (sums.top - whole.top).exp()[:, None]
    return replace(whole, soft_codes_MD=soft_codes_MD)


def _packed(sums: PartSums) -> Tensor:
    """All but `soft_codes_MD` as rows (M, X) of integers, for collectives to copy bit by bit."""
    floats_M4 = torch.stack([sums.top, sums.total, sums.total_tau, sums.weighted], dim=1)
    bits = torch.int32 if floats_M4.element_size() == 4 else torch.int64
    return torch.cat([floats_M4.view(bits), sums.index[:, None].view(bits)], dim=1)


def _unpacked(bits_MX: Tensor) -> PartSums:
    dtype = torch.float32 if bits_MX.dtype == torch.int32 else torch.float64
    top, total, total_tau, weighted = bits_MX[:, :4].T.contiguous().view(dtype)
    return PartSums(bits_MX[:, 4:].contiguous().view(torch.int64)[:, 0], top, total, total_tau, weighted, None)
