"""What a training loop of one's own needs beside the modules: rates, clipping, wrappers, whole state dicts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ibq_scale.errors import UserError
from ibq_scale.quantize.collectives import gather_rows
from ibq_scale.quantize.modules import Quantizer

Model = TypeVar("Model", bound=nn.Module)


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    return ((name, part) for name, part in model.named_modules() if isinstance(part, Quantizer))


def param_groups(
    model: nn.Module, lr: float, codebook_lr: float | None = None, weight_decay: float = 0.0, **settings: Any
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: codebooks have a group with a rate of its own and no weight decay.

    Decay would shrink codes that no token chooses, and a code's gradient is unlike a network's. `codebook_lr`: `lr`
    where None. UserError where the model has no quantizer with something to learn.
    """
    own = own_parameters(model, shards_only=False)
    if not own:
        raise UserError("the model has no quantizer with a codebook to train: give model.parameters() to the optimizer")
    rest = [p for p in model.parameters() if p.requires_grad and p not in own]
    codebooks = [p for p in model.parameters() if p in own]
    rate = lr if codebook_lr is None else codebook_lr
    return [
        {"params": rest, "lr": lr, "weight_decay": weight_decay, **settings},
        {"params": codebooks, "lr": rate, "weight_decay": 0.0, **settings},
    ]


def own_parameters(model: nn.Module, *, shards_only: bool = True) -> set[nn.Parameter]:
    """The parameters that the quantizers own: `fully_shard(model, ignored_params=own_parameters(model))`.

    `shards_only`: those of sharded quantizers only. The quantizer averages their gradients itself.
    """
    found: set[nn.Parameter] = set()
    for _, part in quantizers(model):
        if not shards_only or part.is_sharded:
            found |= {parameter for parameter in part.parameters() if parameter.requires_grad}
    return found


def keep_shards_from_ddp(model: Model) -> Model:
    """Names the shards to DDP, which else makes all ranks' rows equal: `DDP(keep_shards_from_ddp(model))`."""
    names = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    # A module that is used twice has two names.
    for name, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, Quantizer) and part.is_sharded:
            names.add(f"{name}.codebook" if name else "codebook")
    model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]
    return model


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """As torch's `clip_grad_norm_` of all parameters, the same on all ranks also where codebooks are sharded.

    torch's own takes the norm of each rank's shard. The ranks would then scale the parameters that they share by
    different factors, and drift apart. Returns the norm before. Collective.
    """
    own = own_parameters(model)
    others = [p.grad for p in model.parameters() if p.grad is not None and p not in own]
    norms = [torch.nn.utils.get_total_norm(others)] if others else []
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    square = sum((norm.double().square() for norm in norms), torch.zeros((), dtype=torch.float64))
    for _, part in quantizers(model):
        if part.is_sharded:
            square = square + part.grad_square().to(square.device)
    norm = square.sqrt()
    factor = float((max_norm / (norm + 1e-6)).clamp(max=1.0))
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
    return norm


@torch.no_grad()
def whole_state_dict(model: nn.Module, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """The state of the model, or `state` of it, with whole codebooks in place of shards. Collective.

    A model with any number of ranks in its groups, or none, loads it by `load_state_dict`. Also of a model in DDP, with
    DDP's prefix.
    """
    state = dict(model.state_dict() if state is None else state)
    for name, part in model.named_modules(remove_duplicate=False):
        key = f"{name}.codebook" if name else "codebook"
        if isinstance(part, Quantizer) and part.is_sharded and key in state:
            state[key] = gather_rows(part.codebook.detach(), part.placement.group)
    return state
