"""Nearest code by Euclidean distance, whole or sharded: VQGAN's quantizer, and SimVQ's.

SimVQ (arXiv 2411.02038) differs in where the codes come from: a frozen basis times one learned linear layer. The
training's codebook makes them (train/codebook.py). To this function they are plain rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.collectives import Group, Shards, add_at_owned, gather_uneven, owned_codes, scatter_sum_uneven
from ibq_scale.quantize.function import group_name, group_of, library
from ibq_scale.quantize.product import Precision
from ibq_scale.quantize.quantized import Quantized, commitment_terms
from ibq_scale.quantize.search import Score, best_rows
from ibq_scale.quantize.straight_through import carried


class LookupFunction(torch.autograd.Function):
    """C[i] of this rank's tokens out of a sharded codebook. Backward adds at the owners' rows (sum over ranks)."""

    @staticmethod
    def forward(ctx: Any, indices_N: Tensor, rows_KD: Tensor, sizes: list[int], group: Group) -> Tensor:
        indices_M = gather_uneven(indices_N, sizes, group)
        ctx.save_for_backward(indices_M)
        ctx.group, ctx.sizes, ctx.shape = group, sizes, rows_KD.shape
        return scatter_sum_uneven(owned_codes(indices_M, rows_KD, group), sizes, group)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (indices_M,) = ctx.saved_tensors
        grad_rows_KD = upstream[0].new_zeros(ctx.shape)
        add_at_owned(grad_rows_KD, indices_M, gather_uneven(upstream[0], ctx.sizes, ctx.group), ctx.group)
        return None, grad_rows_KD, None, None


def _nearest_rows(
    z_ND: Tensor, rows_KD: Tensor, sizes: list[int], group: str, coarse: Precision, backend: str, tile_bytes: int
) -> Tensor:
    return best_rows(
        z_ND,
        rows_KD,
        Score.DISTANCE,
        coarse=coarse,
        backend=backend,
        tile_bytes=tile_bytes or None,
        group=group_of(group),
        sizes=sizes or None,
    ).index_N


# An operator, since torch.compile cannot follow the search.
library.define(
    "nearest_rows(Tensor z, Tensor rows, int[] sizes, str group, str coarse, str backend, int tile_bytes) -> Tensor"
)
library.impl("nearest_rows", _nearest_rows, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ibq_scale::nearest_rows", lambda z_ND, *_: z_ND.new_empty(len(z_ND), dtype=torch.int64), lib=library
)


def vq(z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, shards: Shards, _: Tensor | None = None) -> Quantized:
    """Quantizes z (N, D) with this rank's rows (K/W, D) of the codebook. There is no entropy term."""
    group, sizes = shards.group, shards.sizes or []
    indices_N = torch.ops.ibq_scale.nearest_rows(
        z_ND.detach(),
        rows_KD.detach(),
        sizes if group is not None else [],
        group_name(group),
        settings.search,
        settings.backend,
        settings.tile_bytes or 0,
    )
    hard_ND: Tensor = LookupFunction.apply(indices_N, rows_KD, sizes, group)
    nothing = z_ND.new_zeros(())
    return Quantized(
        z_q_ND=carried(z_ND, hard_ND, indices_N, settings, shards),
        indices_N=indices_N,
        quantization_loss=commitment_terms(hard_ND, z_ND, settings),
        entropy_loss=nothing,
        sample_entropy=nothing,
        batch_entropy=nothing,
    )
