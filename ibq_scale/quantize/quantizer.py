"""One interface to all quantizers: quantize in training, encode and look up in use, start a codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.errors import UserError
from ibq_scale.quantize.collectives import WHOLE, Group, Shards, size_of
from ibq_scale.quantize.function import Settings, group_name, ibq_function, softmax_sums
from ibq_scale.quantize.lfq import bit_sums, corners, lfq, sign_index
from ibq_scale.quantize.search import Found, Score, best_rows
from ibq_scale.quantize.terms import quantization_loss
from ibq_scale.quantize.types import Quantized
from ibq_scale.quantize.vq import LookupFunction, vq

# Rows drawn together from one seed: any split of the codebook then starts from the same numbers.
INIT_BLOCK = 1024


def quantize(
    z_ND: Tensor,
    rows_KD: Tensor,
    settings: QuantizerConfig,
    shards: Shards = WHOLE,
    mean_K: Tensor | None = None,
) -> Quantized:
    """Quantizes this rank's tokens z (N, D), any float dtype, with gradient.

    `rows_KD` are this rank's rows of the codebook: all of them, or its share as `shards` says. Backward gives the
    gradient of the *sum* over all ranks of their losses, ∂/∂C from the tokens of this rank's group: add the replicas'
    and divide by the world size for the mean. The batch entropy is over all ranks' tokens (`entropy_scope`), or over
    those of a whole optimizer step whose `batch_sums` give `mean_K`: the mean loss over its micro-batches, all of one
    size, then has the gradient of one loss over all.
    Statistics are fp32 (fp64 for fp64 input).

    Raises ValueError on CPU when z or the codebook is not finite.
    """
    shards = _alone_is_none(shards, z_ND.shape[0])
    z_wide_ND = z_ND.to(rows_KD.dtype)
    if settings.kind == "ibq":
        quantized = _ibq(z_wide_ND, rows_KD, settings, shards, mean_K)
    elif settings.kind == "lfq":
        quantized = lfq(z_wide_ND, settings, shards.group, shards.replicas, mean_K)
    else:
        quantized = vq(z_wide_ND, rows_KD, settings, shards.group, shards.sizes or [])
    return quantized._replace(z_q_ND=quantized.z_q_ND.to(z_ND.dtype))


@torch.no_grad()
def batch_sums(
    z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, shards: Shards = WHOLE
) -> tuple[Tensor, Tensor]:
    """What micro-batches add up to a `mean_K` for `quantize`: sums over all ranks' tokens, and the tokens' number.

    The sums are softmax(S/τ) over this rank's rows (K,), for LFQ over its groups of bits.
    """
    shards = _alone_is_none(shards, z_ND.shape[0])
    z_wide_ND = z_ND.to(rows_KD.dtype)
    if settings.kind == "lfq":
        return bit_sums(z_wide_ND, settings, shards.group, shards.replicas)
    assert settings.kind == "ibq", "only IBQ and LFQ have an entropy"
    return softmax_sums(z_wide_ND, rows_KD, _function_settings(settings, shards))


def _alone_is_none(shards: Shards, tokens: int) -> Shards:
    group, replicas = (g if size_of(g) > 1 else None for g in (shards.group, shards.replicas))
    return Shards(group, replicas, shards.sizes or [tokens] * size_of(group))


def _function_settings(settings: QuantizerConfig, shards: Shards) -> Settings:
    return Settings(
        sizes=[] if shards.group is None else shards.sizes or [],
        group=group_name(shards.group),
        replicas=group_name(shards.replicas),
        temperature=settings.entropy_temperature,
        sample_weight=settings.sample_entropy_weight,
        batch_weight=settings.batch_entropy_weight,
        global_entropy=settings.entropy_scope == "global",
        precision=settings.logit_precision,
        backend=settings.backend,
        tile_bytes=settings.tile_bytes or 0,
    )


def _ibq(z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, shards: Shards, mean_K: Tensor | None) -> Quantized:
    out = ibq_function(z_ND, rows_KD, _function_settings(settings, shards), mean_K)
    z_q_ND = out.z_q_ND if settings.straight_through else out.hard_ND
    return Quantized(
        z_q_ND=z_q_ND,
        indices_N=out.indices_N,
        quantization_loss=quantization_loss(z_q_ND, out.hard_ND, z_ND, settings),
        entropy_loss=out.entropy_loss,
        sample_entropy=out.sample_entropy,
        batch_entropy=out.batch_entropy,
    )


@torch.no_grad()
def find(
    z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, group: Group = None, sizes: list[int] | None = None
) -> Found:
    """The code of each token, and how many were decided in fp64. Exact for the values given: see search.py."""
    group = group if size_of(group) > 1 else None
    if settings.kind == "lfq":
        return Found(sign_index(z_ND), torch.zeros((), dtype=torch.int64, device=z_ND.device))
    return best_rows(
        z_ND.to(rows_KD.dtype),
        rows_KD,
        Score.DOT if settings.kind == "ibq" else Score.DISTANCE,
        coarse=settings.search,
        backend=settings.backend,
        tile_bytes=settings.tile_bytes,
        group=group,
        sizes=sizes,
    )


def encode(z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, group: Group = None) -> Tensor:
    """The code (N,) int64 of each token: the same on any device, in any batch, for any number of shards."""
    return find(z_ND, rows_KD, settings, group).index_N


@torch.no_grad()
def lookup(indices_N: Tensor, rows_KD: Tensor, group: Group = None) -> Tensor:
    """The codes (N, D) of global indices (N,), served by the ranks that own them."""
    group = group if size_of(group) > 1 else None
    codes_ND: Tensor = LookupFunction.apply(indices_N, rows_KD, [len(indices_N)] * size_of(group), group)
    return codes_ND


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
    """Rows start..stop of a fresh codebook, fp32 (stop − start, D), the same for every split of it.

    IBQ starts from N(0, 1) (published), VQ from U(−1/K, 1/K) (VQGAN), SimVQ's basis from N(0, 1/D) (published);
    LFQ's are the corners of the cube, for good.
    """
    if settings.kind == "lfq":
        return corners(settings.dim, start, stop)
    drawn = []
    first = start // INIT_BLOCK * INIT_BLOCK
    for block in range(first, stop, INIT_BLOCK):
        generator = torch.Generator().manual_seed(seed * 2_147_483_629 + block)
        values = torch.empty(INIT_BLOCK, settings.dim)
        if settings.kind == "vq":
            bound = 1.0 / settings.codebook_size
            drawn.append(values.uniform_(-bound, bound, generator=generator))
        else:
            std = settings.dim**-0.5 if settings.kind == "simvq" else 1.0
            drawn.append(values.normal_(std=std, generator=generator))
    return torch.cat(drawn)[start - first : stop - first].clone()
