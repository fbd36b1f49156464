"""The gradient of VQ and SimVQ past the choice of a code: straight through, weighted (StableVQ), rotated, or none.

The value is the code in each case.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.collectives import Shards


def carried(z_ND: Tensor, hard_ND: Tensor, indices_N: Tensor, settings: QuantizerConfig, shards: Shards) -> Tensor:
    """The codes `hard_ND` (N, D) of tokens z (N, D), with the gradient to z of `settings.straight_through`.

    `indices_N`: the codes' global numbers, int64. Collective over all ranks for `dynamic`.
    """
    if settings.straight_through is False:
        return hard_ND
    moved_ND = z_ND
    if settings.straight_through == "dynamic":
        weight_N = dynamic_weights(z_ND, hard_ND, indices_N, settings.codebook_size, shards)
        moved_ND = weight_N[:, None] * z_ND
    elif settings.straight_through == "rotation":
        moved_ND = rotated(z_ND, hard_ND)
    return moved_ND + (hard_ND - moved_ND).detach()


@torch.no_grad()
def dynamic_weights(z_ND: Tensor, hard_ND: Tensor, indices_N: Tensor, codes: int, shards: Shards) -> Tensor:
    """w = d*/d (N,) in 0 … 1 (StableVQ, arXiv 2609.26774).

    d is a token's squared distance to its code, d* the least of all ranks' tokens of that code. w = 1 where d = 0.
    """
    own_N = (z_ND - hard_ND).square().sum(dim=1)
    least_K = own_N.new_full((codes,), torch.inf).scatter_reduce_(0, indices_N, own_N, "amin")
    for group in (shards.group, shards.replicas):
        if group is not None:
            dist.all_reduce(least_K, op=dist.ReduceOp.MIN, group=group)
    return torch.where(own_N > 0, least_K[indices_N] / own_N, 1.0)


def rotated(z_ND: Tensor, hard_ND: Tensor) -> Tensor:
    """z (N, D) turned and scaled onto its code by a constant map (the rotation trick, arXiv 2410.06424, eq. 3 to 5).

    A token of zeros has no direction and stays as it is.
    """
    token_ND, code_ND = z_ND.detach(), hard_ND.detach()
    length_N1, code_length_N1 = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (token_ND, code_ND))
    e_ND, q_ND = normalize(token_ND), normalize(code_ND)
    r_ND = normalize(e_ND + q_ND)
    along_r_N1, along_e_N1 = ((z_ND * x).sum(dim=1, keepdim=True) for x in (r_ND, e_ND))
    turned_ND = z_ND - 2 * along_r_N1 * r_ND + 2 * along_e_N1 * q_ND
    return torch.where(length_N1 > 0, turned_ND * code_length_N1 / torch.where(length_N1 > 0, length_N1, 1.0), z_ND)
