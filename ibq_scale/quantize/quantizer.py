"""One interface to all quantizers: quantize in training, encode and look up in use, start a codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.errors import UserError
from ibq_scale.quantize.collectives import WHOLE, Group, Shards, size_of
from ibq_scale.quantize.kinds import KINDS
from ibq_scale.quantize.quantized import Quantized, codebook_weight
from ibq_scale.quantize.region import region_loss
from ibq_scale.quantize.search import Found
from ibq_scale.quantize.vq import LookupFunction


def quantize(
    z_ND: Tensor,
    rows_KD: Tensor,
    settings: QuantizerConfig,
    shards: Shards = WHOLE,
    mean_K: Tensor | None = None,
    age_K: Tensor | None = None,
) -> Quantized:
    """Quantizes this rank's tokens z (N, D), any float dtype, with gradient.

    `rows_KD` are this rank's rows of the codebook: all of them, or its share as `shards` says. BackwardInputs gives the
    gradient of the *sum* over all ranks of their losses, ∂/∂C from the tokens of this rank's group: add the replicas'
    and divide by the world size for the mean. The batch entropy is over all ranks' tokens (`entropy_scope`), or over
    those of a whole optimizer step with `mean_K` from its `batch_sums`. The mean loss over its micro-batches, all of
    one size, then has the gradient of one loss over all. `age_K` is the window of `settings.region`
    (`region.initial_ages`), updated in place. With `settings.l2_normalize` tokens and rows first get length 1.
    Statistics are fp32 (fp64 for fp64 input).

    Raises ValueError on CPU when z or the codebook is not finite.
    """
    shards = _without_groups_of_one(shards, z_ND.shape[0])
    z_wide_ND, rows_KD = _as_compared(z_ND, rows_KD, settings)
    quantized = KINDS[settings.kind].quantize(z_wide_ND, rows_KD, settings, shards, mean_K)
    if settings.region:
        term = region_loss(z_wide_ND, rows_KD, quantized.indices_N, settings, shards, age_K)
        loss = quantized.quantization_loss + codebook_weight(settings) * term
        quantized = quantized._replace(quantization_loss=loss)
    return quantized._replace(z_q_ND=quantized.z_q_ND.to(z_ND.dtype))


@torch.no_grad()
def batch_sums(
    z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, shards: Shards = WHOLE
) -> tuple[Tensor, Tensor]:
    """Sums over all ranks' tokens, and the tokens' number. Added over micro-batches, their quotient is `mean_K`.

    The sums are softmax(S/τ) over this rank's rows (K,), for LFQ over its groups of bits. Other kinds have none.
    """
    shards = _without_groups_of_one(shards, z_ND.shape[0])
    sums = KINDS[settings.kind].batch_sums
    assert sums is not None, f"{settings.kind} has no batch entropy"
    return sums(*_as_compared(z_ND, rows_KD, settings), settings, shards)


def _as_compared(z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig) -> tuple[Tensor, Tensor]:
    """Tokens in the rows' dtype, and rows: both of length 1 with `settings.l2_normalize`."""
    z_ND = z_ND.to(rows_KD.dtype)
    return (unit(z_ND), unit(rows_KD)) if settings.l2_normalize else (z_ND, rows_KD)


def unit(x_ND: Tensor) -> Tensor:
    """Rows of length 1. Rows of zeros stay."""
    norm_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True)
    return x_ND / torch.where(norm_N1 > 0, norm_N1, 1.0)


def _without_groups_of_one(shards: Shards, tokens: int) -> Shards:
    group, replicas = (g if size_of(g) > 1 else None for g in (shards.group, shards.replicas))
    return Shards(group, replicas, shards.sizes or [tokens] * size_of(group))


@torch.no_grad()
def find(
    z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, group: Group = None, sizes: list[int] | None = None
) -> Found:
    """The code of each token, and how many were decided in fp64. Exact for the values given: see search.py."""
    group = group if size_of(group) > 1 else None
    return KINDS[settings.kind].index(*_as_compared(z_ND, rows_KD, settings), settings, group, sizes)


def encode(z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, group: Group = None) -> Tensor:
    """The code (N,) int64 of each token: the same on any device, in any batch, for any number of shards."""
    return find(z_ND, rows_KD, settings, group).index_N


@torch.no_grad()
def lookup(indices_N: Tensor, rows_KD: Tensor, group: Group = None, settings: QuantizerConfig | None = None) -> Tensor:
    """The codes (N, D) of global indices (N,), served by their owners: the rows, or as `settings` scale them."""
    group = group if size_of(group) > 1 else None
    codes_ND: Tensor = LookupFunction.apply(indices_N, rows_KD, [len(indices_N)] * size_of(group), group)
    return unit(codes_ND) if settings is not None and settings.l2_normalize else codes_ND


def rows_of(rank: int, ranks: int, codebook_size: int) -> tuple[int, int]:
    """First and last + 1 row of a rank's equal share. UserError where the ranks do not divide the codebook."""
    if codebook_size % ranks:
        raise UserError(
            f"quantizer.codebook_size={codebook_size} is not divided by the codebook group of {ranks} ranks: "
            f"set codebook_group to a divisor of both, or another codebook_size"
        )
    share = codebook_size // ranks
    return rank * share, (rank + 1) * share


def initial_codebook(settings: QuantizerConfig, seed: int, start: int, stop: int) -> Tensor:
    """Rows start..stop of a fresh codebook, fp32 (stop − start, D), the same for every split of it."""
    rows_KD = KINDS[settings.kind].initial_rows(settings, seed, start, stop)
    return unit(rows_KD) if settings.l2_normalize and KINDS[settings.kind].learns == "rows" else rows_KD
