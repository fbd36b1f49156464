"""One interface to all quantizers: quantize in training, encode and look up in use, start a codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.errors import UserError
from ibq_scale.quantize.collectives import Group, size_of
from ibq_scale.quantize.search import Score, best_rows
from ibq_scale.quantize.terms import commitment_terms
from ibq_scale.quantize.tiled import IBQFunction
from ibq_scale.quantize.types import Quantized
from ibq_scale.quantize.vq import LookupFunction, vq

# Rows drawn together from one seed: any split of the codebook then starts from the same numbers.
INIT_BLOCK = 1024


def quantize(z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, group: Group = None) -> Quantized:
    """Quantizes this rank's tokens z (N, D), any float dtype, with gradient.

    `rows_KD` is the codebook, or with a `group` this rank's K/W consecutive rows of it; every rank of the group
    brings equally many tokens. Backward then gives the gradient of the *sum* over the group's ranks of their losses:
    divide by the world size for the mean. Statistics are fp32 (fp64 for fp64 input).

    Raises ValueError on CPU when z or the codebook is not finite.
    """
    group = group if size_of(group) > 1 else None
    z_wide_ND = z_ND.to(rows_KD.dtype)
    if settings.kind == "vq":
        quantized = vq(z_wide_ND, rows_KD, settings, group)
    else:
        quantized = _ibq(z_wide_ND, rows_KD, settings, group)
    return quantized._replace(z_q_ND=quantized.z_q_ND.to(z_ND.dtype))


def _ibq(z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, group: Group) -> Quantized:
    outputs: tuple[Tensor, ...] = IBQFunction.apply(z_ND, rows_KD, settings, group)
    z_q_ND, hard_ND, entropy_loss, indices_N, sample_entropy, batch_entropy = outputs
    return Quantized(
        z_q_ND=z_q_ND,
        indices_N=indices_N,
        quantization_loss=(z_q_ND - z_ND).square().mean() + commitment_terms(hard_ND, z_ND, settings),
        entropy_loss=entropy_loss,
        sample_entropy=sample_entropy,
        batch_entropy=batch_entropy,
    )


@torch.no_grad()
def encode(z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, group: Group = None) -> Tensor:
    """The code (N,) int64 of each token, decided in fp32 whatever z's dtype."""
    group = group if size_of(group) > 1 else None
    score = Score.DISTANCE if settings.kind == "vq" else Score.DOT
    return best_rows(z_ND.to(rows_KD.dtype), rows_KD, score, settings.tile_bytes, group)


@torch.no_grad()
def lookup(indices_N: Tensor, rows_KD: Tensor, group: Group = None) -> Tensor:
    """The codes (N, D) of global indices (N,), served by the ranks that own them."""
    group = group if size_of(group) > 1 else None
    codes_ND: Tensor = LookupFunction.apply(indices_N, rows_KD, group)
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

    IBQ starts from N(0, 1) (published), VQ from U(−1/K, 1/K) (VQGAN).
    """
    drawn = []
    first = start // INIT_BLOCK * INIT_BLOCK
    for block in range(first, stop, INIT_BLOCK):
        generator = torch.Generator().manual_seed(seed * 2_147_483_629 + block)
        values = torch.empty(INIT_BLOCK, settings.dim)
        if settings.kind == "vq":
            bound = 1.0 / settings.codebook_size
            drawn.append(values.uniform_(-bound, bound, generator=generator))
        else:
            drawn.append(values.normal_(generator=generator))
    return torch.cat(drawn)[start - first : stop - first].clone()
