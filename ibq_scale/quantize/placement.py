"""Where a quantizer module's codebook lies over ranks that no trainer of ours knows: plain DDP, FSDP2, own loops.

The rows of a shard differ from rank to rank. So a wrapper must neither broadcast nor average them. The module averages
its own gradients: they are the mean over ranks of the losses' gradients, as DDP and FSDP give for other parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ibq_scale.errors import UserError
from ibq_scale.quantize.collectives import Group, Shards, own_group, size_of, sizes_in, sum_over


class Layout(NamedTuple):
    """The tokens of a batch over the ranks.

    `factor`: this rank's share of all tokens times the number of ranks. A mean over this rank's tokens times the
    factor, averaged over the ranks, is the mean over all tokens. `tokens`: of all ranks.
    """

    shards: Shards
    factor: float
    tokens: int


class Placement:
    """The ranks that hold a codebook together, and those that hold copies of this rank's rows. None: this rank alone.

    Both have to be known to all ranks of the world in the same order: making one is a collective where only `group` is
    given and does not span the world.
    """

    def __init__(self, group: Any = None, replicas: Any = None) -> None:
        self.group = _process_group(group, "codebook_group")
        self.replicas = _process_group(replicas, "replica_group")
        if self.replicas is None and self.group is not None and size_of(self.group) < dist.get_world_size():
            self.replicas = _copies_of(self.group)
        self.world = size_of(self.group) * size_of(self.replicas)

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def groups(self) -> tuple[Group, Group]:
        """Their ranks together are all that share the codebook."""
        return self.group, self.replicas

    def same_for_all(self, value: int) -> int:
        """The value of the first rank. Collective."""
        shared = [value]
        for group in self.groups:
            if group is not None:
                # As an object: a model is often made on the CPU, where NCCL takes no tensors.
                dist.broadcast_object_list(shared, dist.get_global_rank(group, 0), group=group)
        return shared[0]

    def layout(self, tokens: int, device: torch.device) -> Layout:
        """The layout of a batch where this rank has so many tokens. A GPU waits, unless this rank is alone."""
        if self.alone:
            return Layout(Shards(), float(tokens > 0), tokens)
        sizes = sizes_in(tokens, self.group, device)
        (together,) = sum_over([torch.tensor([sum(sizes)], device=device)], self.replicas)
        everything = int(together)
        return Layout(Shards(self.group, self.replicas, sizes), self.world * tokens / max(everything, 1), everything)

    def total(self, x: Tensor) -> Tensor:
        """The sum over all ranks that share the codebook."""
        for group in self.groups:
            (x,) = sum_over([x], group)
        return x

    def averaged(self, x: Tensor, *, sharded: bool) -> Tensor:
        """x itself. Its gradient becomes the mean over all ranks: of a shard's rows by the replicas' sums alone."""
        if self.alone or not x.requires_grad:
            return x
        groups = (self.replicas,) if sharded else self.groups
        out: Tensor = _Averaged.apply(x, groups, self.world)
        return out

    def __deepcopy__(self, _: dict[int, Any]) -> Placement:
        """The same groups: a copy of a model, as for an average of its weights, is used by the same ranks."""
        return self

    def __reduce__(self) -> Any:
        if not self.alone:
            raise UserError(
                "a quantizer with a codebook_group cannot be pickled, since its groups are of this process: "
                "save whole_state_dict(model) instead"
            )
        return Placement, ()


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: tuple[Group, ...], world: int) -> Tensor:
        ctx.groups, ctx.world = groups, world
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad = upstream[0].clone()
        for group in ctx.groups:
            (grad,) = sum_over([grad], group)
        return grad / ctx.world, None, None


def _process_group(given: Any, name: str) -> Group:
    """The group of this rank, or None where it has no other rank."""
    if given is not None and hasattr(given, "get_group"):
        given = given.get_group()
    if given is None:
        return None
    if not isinstance(given, dist.ProcessGroup):
        raise UserError(
            f"{name} must be a process group with this rank in it, or a mesh of one dimension: got {given!r:.60}"
        )
    return given if size_of(given) > 1 else None


def _copies_of(group: dist.ProcessGroup) -> Group:
    """The ranks with the same place in their codebook groups. Every rank of the world calls it."""
    mine = dist.get_process_group_ranks(group)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    partition = sorted({tuple(ranks) for ranks in found})
    if (
        sorted(rank for ranks in partition for rank in ranks) != list(range(len(found)))
        or len({len(ranks) for ranks in partition}) > 1
    ):
        raise UserError(f"the codebook groups must split all ranks into equal parts: got {[*map(list, partition)]}")
    return own_group(zip(*partition, strict=True))
