"""Reduce-scattered gradients of ZeRO-1 under bf16 train as DeepSpeed's all-reduced ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ibq_scale.config.deepspeed import deepspeed_config
from ibq_scale.config.run import ARRun
from ibq_scale.distributed.world import World
from ibq_scale.zero.gradients import reduction
from tests.ranks import run_ranks
from tests.samples import write_codes
from tests.train.reference import ar_run, gather

WHOLE = "deepspeed.overrides.zero_optimization.reduce_scatter=false"
# The norm is summed in another order, and with it the last bits of what is clipped.
CLIPPED = {"rtol": 1e-5, "atol": 1e-7}


def _train(rank: int, size: int, runs: dict[str, ARRun]) -> dict[str, tuple[dict[str, Any], list[float], list[bool]]]:
    """Fp32 weights on rank 0, gradient norms, and which steps were applied; the third has a gradient of infinity."""
    from ibq_scale.data.sets import open_sets
    from ibq_scale.train.ar_task import ARTask
    from ibq_scale.zero.master_weights import pieces, shapes

    world = World(rank, size, rank, torch.device("cpu"))
    found = {}
    for name, run in runs.items():
        task = ARTask(run, world, open_sets(run.data, "codes"))
        batches = task.batches(0)
        norms, applied = [], []
        for number in range(5):
            task.set_rates(number * run.train.global_batch)
            broken = task.engine.module.head.weight
            hook = broken.register_hook(lambda grad: grad * torch.inf if rank == size - 1 else grad)
            if number != 2:
                hook.remove()
            step = task.train_step(batches)
            hook.remove()
            applied.append(step.applied)
            norms.append(float(step.metrics["grad_norm"]))
        weights = gather(pieces(task.engine, world), shapes(task.engine), world) or {}
        found[name] = ({key: value.numpy() for key, value in weights.items()}, norms, applied)
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 3])
def test_each_rank_gets_its_part_of_the_same_sums(size: int, tmp_path: Path) -> None:
    write_codes(tmp_path)
    words = ("deepspeed.config=zero1", "train.precision=bf16", "train.global_batch=12")
    clips = {"clipped": "optimizer.grad_clip=0.5", "free": "optimizer.grad_clip=1e6"}
    runs = {
        f"{name} {how}": ar_run(str(tmp_path), *words, clip, *more)
        for name, clip in clips.items()
        for how, more in (("parts", ()), ("whole", (WHOLE,)))
    }
    kinds = {name: reduction(deepspeed_config(run, size)) for name, run in runs.items()}
    assert (kinds["free parts"], kinds["free whole"]) == ("reduce-scatter", "all-reduce")
    ranks = run_ranks(_train, size, runs)
    for name in clips:
        for found in ranks:
            (parts, norms, applied), (whole, other_norms, other) = found[f"{name} parts"], found[f"{name} whole"]
            assert applied == other == [True, True, False, True, True]
            assert norms[:2] == pytest.approx(other_norms[:2], rel=1e-6)
            assert norms[:2] == pytest.approx(ranks[0][f"{name} parts"][1][:2], rel=0)
            assert parts.keys() == whole.keys()
            for key, value in whole.items():
                limits = CLIPPED if name == "clipped" or size > 2 else {"rtol": 0, "atol": 0}
                torch.testing.assert_close(torch.from_numpy(parts[key]), torch.from_numpy(value), **limits)
