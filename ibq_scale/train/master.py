"""The fp32 weights behind a DeepSpeed engine, in the pieces that this rank's optimizer owns, for every ZeRO stage.

The model's own parameters are no good for averages and exports: under bf16 they are rounded, under ZeRO-3 they are not
there. The optimizer's fp32 master weights are both, and already spread over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibq_scale.distributed.environment import World


class Fragment(NamedTuple):
    """A piece of a parameter: `values` (n,) are elements start … start + n − 1 of the flattened parameter."""

    name: str
    start: int
    values: Tensor


_Find = Callable[[Any, str, nn.Parameter], Fragment | None]


def fragments(engine: Any, world: World) -> list[Fragment]:
    """This rank's pieces, fp32, in the optimizer's own memory; the ranks' together are every parameter exactly once."""
    parameters = dict(engine.module.named_parameters())
    find: _Find
    if engine.zero_optimization_stage() == 3:
        find = _zero3
    elif hasattr(next(iter(parameters.values())), "_hp_mapping"):
        find = _partitioned
    else:
        find = _replicated(parameters, world)
    found = (find(engine, name, parameter) for name, parameter in parameters.items())
    return [fragment for fragment in found if fragment is not None]


def shapes(engine: Any) -> dict[str, torch.Size]:
    """Every parameter's whole shape, by name."""
    return {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}


def gather(pieces: Iterable[Fragment], whole: dict[str, torch.Size], world: World) -> dict[str, Tensor] | None:
    """The parameters that the ranks' pieces make, fp32 on rank 0's CPU; None elsewhere. Collective."""
    mine = {piece.name: piece for piece in pieces}
    weights = {}
    for name, shape in whole.items():
        flat = torch.zeros(shape.numel(), device=world.device)
        if name in mine:
            _, start, values = mine[name]
            flat[start : start + len(values)] = values
        dist.reduce(flat, dst=0)
        if world.is_main:
            weights[name] = flat.view(shape).cpu()
    return weights if world.is_main else None


def _partitioned(engine: Any, name: str, parameter: nn.Parameter) -> Fragment | None:
    """ZeRO-1, ZeRO-2, and bf16 without ZeRO: a rank's partition of all parameters, cut at any place."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's; None where all is others'
    if mapping is None:
        return None
    return Fragment(name, mapping.lp_fragment_address.start, mapping.get_hp_fragment().detach())


def _zero3(engine: Any, name: str, parameter: nn.Parameter) -> Fragment | None:
    """Each parameter cut into equal pieces, the last padded."""
    piece: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    start = piece.ds_numel * dist.get_rank()
    length = min(piece.ds_numel, parameter.ds_numel - start)  # type: ignore[attr-defined]
    if length <= 0:
        return None
    # Not safe_get_local_fp32_param: it copies offloaded weights to the device, every time.
    values, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
    return Fragment(name, start, values[:length].detach())


def _replicated(parameters: dict[str, nn.Parameter], world: World) -> _Find:
    """No ZeRO: every rank has all; the largest first, each is given to the rank that has least."""
    load = [0] * world.size
    owners = {}
    for name, parameter in sorted(parameters.items(), key=lambda item: (-item[1].numel(), item[0])):
        owners[name] = load.index(min(load))
        load[owners[name]] += parameter.numel()

    def find(engine: Any, name: str, parameter: nn.Parameter) -> Fragment | None:
        return Fragment(name, 0, parameter.detach().view(-1)) if owners[name] == world.rank else None

    return find
