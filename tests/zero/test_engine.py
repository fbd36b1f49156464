"""Settings of the process around an engine."""

from __future__ import annotations

import resource

import pytest
import torch

from ibq_scale.zero.engine import begin_deepspeed
from tests.ranks import run_ranks


def _page_faults(rank: int, size: int) -> int:
    """Of 256 MiB in small tensors, the second time."""
    begin_deepspeed(torch.device("cpu"))
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        gradients = [torch.ones(2**20) for _ in range(64)]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        del gradients
    return faults


@pytest.mark.slow
@pytest.mark.distributed
def test_a_step_on_a_cpu_reuses_the_memory_of_the_last_ones_gradients() -> None:
    (faults,) = run_ranks(_page_faults, 1)
    assert faults < 8_000, "65,536 where freed memory returns to the kernel"
