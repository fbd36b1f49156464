"""What Muon steps, what its iterations cost, and where it is refused. tests/zero/test_muon.py compares its steps."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ibq_scale.config.deepspeed import deepspeed_config
from ibq_scale.config.layers import resolve
from ibq_scale.config.run import ARRun
from ibq_scale.errors import UserError
from ibq_scale.models.muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, newton_schulz
from ibq_scale.models.muon import newton_schulz_flops as flops
from ibq_scale.models.optimizers import MOMENTS, adamw, moments, restored_state
from ibq_scale.models.transformer import Transformer


def _run(*words: str) -> ARRun:
    run = resolve("ar/tiny", ["data.train=none", "optimizer.kind=muon", "model.depth=1", *words]).config
    assert isinstance(run, ARRun)
    return run


def test_it_steps_the_matrices_of_the_blocks_alone() -> None:
    run = _run("model.qk_norm=true", "optimizer.momentum=0.9")
    with torch.device("meta"):
        model = Transformer(run.model)
    optimizer = adamw(model, run.optimizer)
    kinds = {name: moments(optimizer, parameter) for name, parameter in model.named_parameters()}
    layers = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
    assert {name for name, kind in kinds.items() if kind != MOMENTS} == {f"blocks.0.{layer}.weight" for layer in layers}
    muon, decayed, free = optimizer.param_groups
    assert (muon["momentum"], muon["weight_decay"]) == (0.9, decayed["weight_decay"])
    assert free["weight_decay"] == 0 < decayed["weight_decay"]
    state = restored_state(optimizer, model.get_parameter("blocks.0.attention.wo.weight"), 3)
    assert set(state) == {"step", "momentum_buffer"}


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_the_flops_are_those_of_the_products(shape: tuple[int, int]) -> None:
    matrix = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with FlopCounterMode(display=False) as counter:
        newton_schulz(matrix, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS)
    assert flops(*shape) == counter.get_total_flops()


def test_where_it_is_refused() -> None:
    with pytest.raises(UserError, match="a tokenizer's are convolutions"):
        resolve("tokenizer/tiny", ["data.train=none", "optimizer.kind=muon"])
    for config in ("zero3", "zero2_offload", "zero3_offload"):
        with pytest.raises(UserError, match=rf"{config}\.json: Muon needs whole matrices on the GPU"):
            deepspeed_config(_run(f"deepspeed.config={config}"), 2)
    deepspeed_config(_run("deepspeed.config=zero2"), 2)
