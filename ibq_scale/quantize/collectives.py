"""Collectives of a codebook group. A group of None is a group of one: nothing moves.

None of these carries a gradient. The quantizers' own backward passes call them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

# torch 2.14 renamed both and warns of the old names. 2.11 to 2.13 have no others.
_all_gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., object] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Shards(NamedTuple):
    """How a codebook lies over ranks.

    The ranks of `group` hold its rows, K/W consecutive ones each. Those of `replicas` hold the same rows as this one.
    `sizes` are the group's ranks' numbers of tokens where they differ (`sizes_in` asks for them).
    """

    group: Group = None
    replicas: Group = None
    sizes: list[int] | None = None


WHOLE = Shards()
"""The whole codebook on this rank, alone."""


def own_group(partition: Iterable[Sequence[int]]) -> Group:
    """This rank's group, of a partition of the world's ranks into equal parts. None for a group of one.

    Each rank makes its own group only, so this takes as long for a thousand groups as for one. NCCL splits the world
    once, since all ranks take part.
    """
    ranks = next(ranks for ranks in partition if dist.get_rank() in ranks)
    if len(ranks) == 1:
        return None
    made = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


def size_of(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def gather_rows(x_NX: Tensor, group: Group) -> Tensor:
    """Every rank's rows, in rank order: (W·N, …)."""
    if group is None:
        return x_NX
    out = x_NX.new_empty((size_of(group) * x_NX.shape[0], *x_NX.shape[1:]))
    _all_gather(out, x_NX.contiguous(), group=group)
    return out


def scatter_sum_rows(x_MX: Tensor, group: Group) -> Tensor:
    """The sum over ranks of (W·N, …). Each rank keeps its own N rows."""
    if group is None:
        return x_MX
    out = x_MX.new_empty((x_MX.shape[0] // size_of(group), *x_MX.shape[1:]))
    _reduce_scatter(out, x_MX.contiguous(), group=group)
    return out


def gather_uneven(x_NX: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """`gather_rows` where rank r brings sizes[r] rows: all are padded to the most, as collectives want equal parts."""
    if group is None or len(set(sizes)) == 1:
        return gather_rows(x_NX, group)
    most = max(sizes)
    padded = torch.cat([x_NX, x_NX.new_zeros((most - x_NX.shape[0], *x_NX.shape[1:]))])
    parts = torch.split(gather_rows(padded, group), most)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def scatter_sum_uneven(x_MX: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """`scatter_sum_rows` where rank r keeps sizes[r] rows."""
    if group is None or len(set(sizes)) == 1:
        return scatter_sum_rows(x_MX, group)
    most = max(sizes)
    padded = x_MX.new_zeros((len(sizes) * most, *x_MX.shape[1:]))
    for rank, part in enumerate(torch.split(x_MX, list(sizes))):
        padded[rank * most : rank * most + len(part)] = part
    return scatter_sum_rows(padded, group)[: sizes[rank_in(group)]]


def exchange_uneven(x_MX: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Of every rank's rows (M, …), those of this rank's own tokens: (W, N, …), in rank order. Rank r has sizes[r]."""
    mine, ranks = sizes[rank_in(group)], len(sizes)
    out = x_MX.new_empty((ranks * mine, *x_MX.shape[1:]))
    dist.all_to_all_single(out, x_MX.contiguous(), [mine] * ranks, list(sizes), group=group)
    return out.view(ranks, mine, *x_MX.shape[1:])


def sizes_in(tokens: int, group: Group, device: torch.device) -> list[int]:
    """Every rank's number of tokens. On a GPU it waits for the device, so only uneven ranks should call it."""
    if group is None:
        return [tokens]
    mine = torch.tensor([tokens], device=device)
    return [int(size) for size in gather_rows(mine, group).tolist()]


def sum_over(tensors: Iterable[Tensor], group: Group) -> list[Tensor]:
    """Sums each tensor over the ranks, all in one collective."""
    parts = list(tensors)
    if group is None:
        return parts
    flat = torch.cat([t.reshape(-1) for t in parts])
    dist.all_reduce(flat, group=group)
    return [piece.view_as(t) for piece, t in zip(torch.split(flat, [t.numel() for t in parts]), parts, strict=True)]


def owned_codes(index_M: Tensor, rows_KD: Tensor, group: Group) -> Tensor:
    """C[i*] where this rank owns the row, else zeros."""
    if group is None:
        return rows_KD[index_M]
    local, owned = _local(index_M, rows_KD.shape[0], group)
    return rows_KD[local] * owned[:, None]


def add_at_owned(grad_rows_KD: Tensor, index_M: Tensor, g_MD: Tensor, group: Group) -> None:
    """∂L/∂C[i*] += g for this rank's own rows, for each row in the tokens' order.

    On a GPU index_add_ adds in any order, and index_put_ sorts the rows first.
    """
    codes = grad_rows_KD.shape[0]
    local, owned = _local(index_M, codes, group)
    # A row gets its tokens one after another. Those of other ranks would all be row 0's, and bring it nothing.
    local = torch.where(owned, local, torch.arange(len(local), device=local.device) % codes)
    g_MD = g_MD * owned[:, None]
    if grad_rows_KD.is_cuda:
        grad_rows_KD.index_put_((local,), g_MD, accumulate=True)
    else:
        grad_rows_KD.index_add_(0, local, g_MD)


def _local(index_M: Tensor, codes: int, group: Group) -> tuple[Tensor, Tensor]:
    """Global indices as this rank's row numbers (0 for a row of another rank), and a mask of its own."""
    local = index_M - rank_in(group) * codes
    owned = (local >= 0) & (local < codes)
    return torch.where(owned, local, 0), owned
