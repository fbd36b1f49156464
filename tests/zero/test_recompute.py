"""Selective activation checkpointing under ZeRO-3, which gathers other weights in the second pass than in the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ibq_scale.config.run import ARRun
from ibq_scale.distributed.world import World
from tests.ranks import run_ranks
from tests.samples import write_codes
from tests.train.reference import ar_run

# Of a model of 0.7M parameters, so that blocks are released, and gathered ahead in parts.
LIMITS = {"param_persistence_threshold": 100, "prefetch_bucket_size": 60_000}
LIMITS |= {"max_live_parameters": 150_000, "max_reuse_distance": 150_000}


def _losses(rank: int, size: int, runs: dict[str, ARRun]) -> dict[str, list[float]]:
    """Of three steps of each run; DeepSpeed gathers ahead from the second on."""
    from ibq_scale.data.sets import open_sets
    from ibq_scale.train.ar_task import ARTask

    found = {}
    for name, run in runs.items():
        task = ARTask(run, World(rank, size, rank, torch.device("cpu")), open_sets(run.data, "codes"))
        batches = task.batches(0)
        found[name] = []
        for step in range(3):
            task.set_rates(step * run.train.global_batch)
            found[name].append(float(task.train_step(batches).metrics["loss"]))
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_what_is_recomputed_may_gather_other_weights(tmp_path: Path) -> None:
    write_codes(tmp_path)
    words = ["deepspeed.config=zero3", "train.precision=bf16", "model.depth=8", "model.width=64"]
    words += [f"deepspeed.overrides.zero_optimization.stage3_{name}={value}" for name, value in LIMITS.items()]
    runs = {
        how: ar_run(str(tmp_path), *words, f"model.activation_checkpointing={how}") for how in ("none", "selective")
    }
    for losses in run_ranks(_losses, 2, runs):
        assert losses["selective"] == losses["none"]
        assert len(set(losses["none"])) > 1, "the weights move"
