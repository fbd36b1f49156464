"""Both optimizers step by torch's fused kernel, and go on from a restored state as if nothing had been between."""

from __future__ import annotations

import torch
from torch import nn

from ibq_scale.config.optimizer import OptimizerConfig
from ibq_scale.models.optimizers import MOMENTS, adam, adamw, restored_state

SETTINGS = OptimizerConfig(lr=0.1, weight_decay=0.5)


def _step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, number: int) -> None:
    parameter.grad = torch.full_like(parameter, 0.3) + number
    optimizer.step()


def test_both_optimizers_are_fused() -> None:
    network = nn.Linear(3, 2)
    for optimizer in (adam(network.parameters(), SETTINGS), adamw(network, SETTINGS)):
        assert all(group["fused"] for group in optimizer.param_groups)


def test_a_restored_state_goes_on_in_the_same_bits() -> None:
    one, two = nn.Parameter(torch.linspace(-1, 1, 37)), nn.Parameter(torch.empty(37))
    first, second = adam([one], SETTINGS), adam([two], SETTINGS)
    for number in range(3):
        _step(first, one, number)
    with torch.no_grad():
        two.copy_(one)
    state = restored_state(second, two, 3.0)
    for moment in MOMENTS:
        assert not state[moment].any()
        state[moment].copy_(first.state[one][moment])
    _step(first, one, 3)
    _step(second, two, 3)
    assert torch.equal(one, two)


def test_a_restored_step_count_is_where_the_fused_kernel_reads_it() -> None:
    parameter = nn.Parameter(torch.empty(4, dtype=torch.bfloat16, device="meta"))
    step = restored_state(adam([parameter], SETTINGS), parameter, 7.0)["step"]
    assert (step.device.type, step.dtype) == ("meta", torch.float32)


def test_moments_that_are_there_are_kept() -> None:
    parameter = nn.Parameter(torch.ones(4))
    optimizer = adam([parameter], SETTINGS)
    _step(optimizer, parameter, 0)
    before = optimizer.state[parameter]["exp_avg"]
    assert restored_state(optimizer, parameter, 1.0)["exp_avg"] is before
