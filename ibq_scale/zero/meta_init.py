"""Builds a transformer from the meta device, module by module. No rank ever holds more of it than in training.

Under ZeRO-3 each module is partitioned as soon as it has memory, and a rank makes (or reads) only its own elements. The
weights are the same on any number of ranks and under any ZeRO stage.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ibq_scale.config.run import ARRun
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.models.fp8 import check_fp8, use_fp8
from ibq_scale.models.initial import Values, drawn, fill
from ibq_scale.models.transformer import TrainedTransformer
from ibq_scale.pretrained.loading import stored
from ibq_scale.zero.engine import begin_deepspeed


def build_transformer(run: ARRun, config: dict[str, Any], world: World) -> TrainedTransformer:
    """The run's model for `make_engine`, drawn from its seed or read from its `init`. Collective.

    UserError if `init` holds other sizes, or the config asks for something that cannot be built so, or not here.
    """
    if run.model.fp8:
        check_fp8(run, world.device)
    with torch.device("meta"):
        model = TrainedTransformer(run.model)
    values = drawn(model.initial(), run.train.seed)
    if run.init is not None:
        values = stored(run.init, model, values)
    materialize(model, values, config, world)
    if run.model.fp8:
        use_fp8(model)
    if run.model.compile:
        model.compile_regions()
    return model


def materialize(model: nn.Module, values: Values, config: dict[str, Any], world: World) -> None:
    """Gives a model on the meta device its memory and weights, in the form of this DeepSpeed config's engine.

    The weights are bf16 if the precision is: DeepSpeed makes its fp32 weights from them on every stage. Collective.
    """
    import deepspeed

    stage = config.get("zero_optimization", {}).get("stage", 0)
    begin_deepspeed(world.device)
    model.to(torch.bfloat16 if config["bf16"]["enabled"] else torch.float32)
    for prefix, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(prefix, recurse=False)]
        if not names:
            continue
        assert not list(module.children()), "partitioned as a whole, before its children have memory"
        module.to_empty(device=world.device, recurse=False)
        if stage == 3:
            # This broadcasts rank 0's uninitialised elements. It costs one step's traffic and cannot be avoided.
            deepspeed.zero.Init(module=module, config_dict_or_path=config)
        for name, parameter in zip(names, module.parameters(recurse=False), strict=True):
            if stage == 3:
                _fill_partition(parameter, values, name)
            else:
                fill(parameter.detach().view(-1), values, name)


def _fill_partition(parameter: nn.Parameter, values: Values, name: str) -> None:
    """Writes this rank's piece. DeepSpeed 0.19.8 cuts a flattened parameter into equal ones, the last padded."""
    zero: Any = parameter
    if zero.ds_secondary_tensor is not None:
        raise UserError("zero_hpz_partition_size keeps second copies of the weights: not supported, leave it out")
    piece = zero.ds_tensor
    start = piece.ds_numel * dist.get_rank()
    length = max(min(piece.ds_numel, zero.ds_numel - start), 0)
    fill(piece[:length], values, name, start)
    piece[length:].zero_()
