"""The fp32 weights behind a DeepSpeed engine, in the pieces of this rank's optimizer, for every ZeRO stage.

The model's own parameters do not suit averages and exports: under bf16 they are rounded, under ZeRO-3 they are absent.
The optimizer's fp32 master weights are neither, and already spread over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibq_scale.checkpoint.pieces import Piece
from ibq_scale.distributed.world import World


class Fragment(NamedTuple):
    """Elements start … start + length − 1 of the flattened parameter `name`, and their place in the optimizer.

    `flat` is the optimizer's own fp32 parameter. The fragment is its `length` elements from `offset` on.
    """

    name: str
    start: int
    length: int
    flat: Tensor
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """This fragment's part (length,) of a tensor as large as `flat`: of `flat` itself, or of its moments."""
        return whole.detach().view(-1)[self.offset : self.offset + self.length]

    def piece(self) -> Piece:
        """The fp32 weights, in the optimizer's own memory."""
        return Piece(self.name, self.start, self.of(self.flat))


_Find = Callable[[Any, str, nn.Parameter], Fragment | None]


def fragments(engine: Any, world: World) -> list[Fragment]:
    """This rank's share. Together the ranks' shares have every parameter exactly once."""
    parameters = dict(engine.module.named_parameters())
    find: _Find
    if engine.zero_optimization_stage() == 3:
        find = _zero3
    elif hasattr(next(iter(parameters.values())), "_hp_mapping"):
        find = partitioned
    else:
        find = _replicated(parameters, world)
    found = (find(engine, name, parameter) for name, parameter in parameters.items())
    return [fragment for fragment in found if fragment is not None]


def pieces(engine: Any, world: World) -> list[Piece]:
    """The weights of this rank's share."""
    return [fragment.piece() for fragment in fragments(engine, world)]


def held(engine: Any, world: World) -> list[Fragment]:
    """All that this rank's optimizer updates: its share, or every parameter without ZeRO."""
    if hasattr(engine.optimizer, "optimizer"):
        return fragments(engine, world)
    return [_whole(name, parameter) for name, parameter in engine.module.named_parameters()]


def shapes(engine: Any) -> dict[str, torch.Size]:
    return {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}


def partitioned(engine: Any, name: str, parameter: nn.Parameter) -> Fragment | None:
    """ZeRO-1, ZeRO-2 and their bf16 variants: a rank's partition of all parameters, cut at any place."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's. None if other ranks own it all
    if mapping is None:
        return None
    optimizer = engine.optimizer
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Fragment(name, here.start, here.numel, flats[mapping.param_group_index], there.start)


def _zero3(engine: Any, name: str, parameter: nn.Parameter) -> Fragment | None:
    """ZeRO-3: each parameter cut into equal pieces, the last one padded."""
    piece: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    start = piece.ds_numel * dist.get_rank()
    length = min(piece.ds_numel, parameter.ds_numel - start)  # type: ignore[attr-defined]
    if length <= 0:
        return None
    optimizer = engine.optimizer
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return Fragment(name, start, length, optimizer.fp32_partitioned_groups_flat[group], offset)


def _replicated(parameters: dict[str, nn.Parameter], world: World) -> _Find:
    """No ZeRO: every rank has all parameters. Largest first, each goes to the rank with the least load."""
    load = [0] * world.size
    owners = {}
    for name, parameter in sorted(parameters.items(), key=lambda item: (-item[1].numel(), item[0])):
        owners[name] = load.index(min(load))
        load[owners[name]] += parameter.numel()

    def find(engine: Any, name: str, parameter: nn.Parameter) -> Fragment | None:
        return _whole(name, parameter) if owners[name] == world.rank else None

    return find


def _whole(name: str, parameter: nn.Parameter) -> Fragment:
    return Fragment(name, 0, parameter.numel(), parameter, 0)
