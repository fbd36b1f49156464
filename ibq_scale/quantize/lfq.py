"""Lookup-free quantization (MAGVIT-v2, arXiv 2310.05737; Open-MAGVIT2, arXiv 2409.04410): a code is D sign bits.

The codebook is the corners {−1, 1}^D in binary order, bit 0 the most significant, K = 2^D. Scores z·c are sums over
bits, so softmax over all K corners factorizes: a token's entropy is the exact sum of its bits' entropies. The batch
entropy does not factorize. Over groups of bits, as in Open-MAGVIT2, it is an upper bound.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.collectives import Group, Shards, sum_over
from ibq_scale.quantize.quantized import Quantized, batch_entropy_of, batch_entropy_slope, commitment_terms

# Bits of one joint distribution in the batch entropy: Open-MAGVIT2 cuts 18 bits into two nines.
GROUP_BITS = 9


def corners(dim: int, start: int, stop: int) -> Tensor:
    """Codes start … stop − 1, fp32 (stop − start, D)."""
    index_K = torch.arange(start, stop)
    bits_KD = (index_K[:, None] >> _shifts(dim)) & 1
    return bits_KD.float() * 2.0 - 1.0


def sign_index(z_ND: Tensor) -> Tensor:
    """The corner nearest to each token, int64 (N,). A zero counts as −1, the lower index."""
    return ((z_ND > 0).long() << _shifts(z_ND.shape[1]).to(z_ND.device)).sum(dim=1)


def lfq(z_ND: Tensor, _: Tensor, settings: QuantizerConfig, shards: Shards, mean_J: Tensor | None = None) -> Quantized:
    """Quantizes z (N, D). The batch entropy runs over all ranks' tokens where `settings.entropy_scope` says so.

    With `mean_J` from `bit_sums` it runs over a whole optimizer step.
    """
    hard_ND = torch.where(z_ND > 0, 1.0, -1.0).to(z_ND.dtype)
    log_bit_ND2 = _bit_log_probabilities(z_ND, settings.entropy_temperature)
    sample_entropy = -(log_bit_ND2.exp() * log_bit_ND2).sum(dim=(1, 2)).mean()
    batch_entropy = _batch_entropy(log_bit_ND2, _others(settings, shards), mean_J)
    return Quantized(
        z_q_ND=z_ND + (hard_ND - z_ND).detach() if settings.straight_through else hard_ND,
        indices_N=sign_index(z_ND),
        quantization_loss=commitment_terms(hard_ND, z_ND, settings),
        entropy_loss=settings.sample_entropy_weight * sample_entropy - settings.batch_entropy_weight * batch_entropy,
        sample_entropy=sample_entropy.detach(),
        batch_entropy=batch_entropy.detach(),
    )


def _bit_log_probabilities(z_ND: Tensor, temperature: float) -> Tensor:
    """log q of bit = 0 and 1, (N, D, 2): softmax of (−z, z)/τ, equal to softmax(z·c/τ) over the corners, bit by bit."""
    logit_ND = 2.0 * z_ND / temperature
    return torch.stack([F.logsigmoid(-logit_ND), F.logsigmoid(logit_ND)], dim=2)


def bit_sums(z_ND: Tensor, _: Tensor, settings: QuantizerConfig, shards: Shards) -> tuple[Tensor, Tensor]:
    """Σ q of all ranks' tokens over every group of bits, end to end, and the number of tokens."""
    return _sums(_bit_log_probabilities(z_ND, settings.entropy_temperature), _others(settings, shards))


def _others(settings: QuantizerConfig, shards: Shards) -> tuple[Group, ...]:
    """The groups of ranks whose tokens share q̄."""
    return (shards.group, shards.replicas) if settings.entropy_scope == "global" else ()


def _sums(log_bit_ND2: Tensor, others: tuple[Group, ...]) -> tuple[Tensor, Tensor]:
    sums = []
    for part in torch.split(log_bit_ND2, GROUP_BITS, dim=1):
        log_q_NJ = part[:, 0]
        for bit in range(1, part.shape[1]):
            log_q_NJ = (log_q_NJ[:, :, None] + part[:, bit, None, :]).flatten(1)
        sums.append(log_q_NJ.exp().sum(dim=0))
    return _over_all(torch.cat(sums), others), _over_all(log_bit_ND2.new_tensor(float(len(log_bit_ND2))), others)


def _batch_entropy(log_bit_ND2: Tensor, others: tuple[Group, ...], given_J: Tensor | None) -> Tensor:
    """Σ over groups of bits of −Σ q̄ log(q̄ + ε), q̄ over the tokens of this rank and of the `others`, or as given."""
    sums_J, tokens = _sums(log_bit_ND2, others)
    mean_J = sums_J / tokens
    if given_J is None:
        return batch_entropy_of(mean_J)
    # The value at the given q̄, and its slope there on these tokens.
    return batch_entropy_of(given_J) - (batch_entropy_slope(given_J) * (mean_J - mean_J.detach())).sum()


def _over_all(x: Tensor, groups: tuple[Group, ...]) -> Tensor:
    for group in groups:
        if group is not None:
            x = _SumOver.apply(x, group)
    return x


class _SumOver(torch.autograd.Function):
    """The sum over a group's ranks. The losses of all ranks reach each rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return sum_over([x], group)[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return sum_over([upstream[0]], ctx.group)[0], None


def _shifts(dim: int) -> Tensor:
    return torch.arange(dim - 1, -1, -1)
