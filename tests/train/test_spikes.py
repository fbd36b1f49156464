"""A planted spike is applied on no rank and to nothing: the run goes on as if its batch were absent, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ibq_scale.checkpoint.reading import newest_or_this
from ibq_scale.config.run import TokenizerRun
from ibq_scale.data.sets import DataSets
from ibq_scale.distributed.world import World
from tests.nursery import commands
from tests.ranks import run_ranks
from tests.samples import SMALL_AR
from tests.train.reference import draw_images, image_batches, tokenizer_run, tokenizer_state
from tests.train.runs import lines, words

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
EARLY = "from ibq_scale.supervise import spikes; spikes.LEAST = 4"
# Rank 1's pictures of step 7 are 40 times as bright.
PLANTED = f"""
{EARLY}
import os
from ibq_scale.train.tokenizer_task import TokenizerTask
plain = TokenizerTask._generator_backward
def planted(self, images, mean_K):
    return plain(self, images * 40 if (self.number, self.world.rank) == (7, 1) else images, mean_K)
TokenizerTask._generator_backward = planted
"""


def _train(data: str, run: Path, before: str, *more: str) -> None:
    common = ("data.workers=0", "train.micro_batch=2", "train.skip_spikes=8", "loss.adversarial_start=0", *more)
    for rank in commands(words(data, run, *common), 2, before):
        assert rank.wait() == 0, rank.said()


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    newest = newest_or_this(run).path
    return {
        f"{path.relative_to(newest)}/{name}": values
        for path in newest.rglob("*.safetensors")
        for name, values in load_file(path).items()
    }


def _differing(one: Path, two: Path) -> set[str]:
    a, b = _tensors(one), _tensors(two)
    assert a.keys() == b.keys()
    return {name for name in a if not torch.allclose(a[name], b[name], rtol=0, atol=0, equal_nan=True)}


def test_a_spike_of_one_rank_is_skipped_as_if_its_batch_were_absent(dataset: str, tmp_path: Path) -> None:
    spiked, absent, resumed = tmp_path / "spiked", tmp_path / "absent", tmp_path / "resumed"
    _train(dataset, spiked, PLANTED, "train.steps=10")
    assert [line["skipped"] for line in lines(spiked)] == [0.0] * 6 + [1.0] + [0.0] * 3
    said = (spiked / "logs/rank-00000.log").read_text()
    assert "step 7 was skipped on all ranks: a spike: loss" in said
    assert said.partition("a spike: ")[2].partition("\n")[0].count("rank 1: ") == 1
    assert "rank 0: " not in said.partition("a spike: ")[2].partition("\n")[0]

    _train(dataset, absent, EARLY, "train.steps=10", "train.skip_steps=[7:8]")
    assert [line.get("loss") for line in lines(absent)] == [line.get("loss") for line in lines(spiked)]
    # The spike is in the memory of spikes, at its limit, and its codes were counted.
    assert {name.partition(".")[0] for name in _differing(spiked, absent)} == {"spikes", "usage"}

    _train(dataset, resumed, PLANTED, "train.steps=8")
    _train(dataset, resumed, PLANTED, "train.steps=10")
    assert _differing(spiked, resumed) == set()
    assert lines(resumed)[6]["skipped"] == 1.0


def _spike_under_each_stage(rank: int, world_size: int, runs: dict[str, TokenizerRun]) -> dict[str, list[bool]]:
    from ibq_scale.supervise import spikes
    from ibq_scale.train.tokenizer_task import TokenizerTask

    spikes.LEAST = 4
    world = World(rank, world_size, rank, torch.device("cpu"))
    applied = {}
    for name, run in runs.items():
        task = TokenizerTask(run, world, DataSets((), run.data))
        found = []
        for step in range(6):
            images = draw_images(0, 0, run.train.global_batch)
            task.set_rates(step * run.train.global_batch)
            factor = 50.0 if step == 4 and rank == 1 else 1.0
            hook = task.generator.module.autoencoder.quant_conv.register_forward_hook(
                lambda _, __, out, factor=factor: out * factor
            )
            before = tokenizer_state(task, world)
            result = task.train_step(iter(image_batches(images, rank, world_size)))
            hook.remove()
            after = tokenizer_state(task, world)
            same = [key in before and torch.equal(value, before[key]) for key, value in after.items()]
            assert all(same) == (not result.applied), (name, step)
            assert (result.spike is None) == result.applied, (name, step)
            found.append(result.applied)
        applied[name] = found
    return applied


def test_both_networks_and_the_codebook_skip_together_under_each_zero_stage() -> None:
    runs = {
        f"{config} {precision}": tokenizer_run(
            config,
            "train.global_batch=8",
            "train.skip_spikes=20",
            f"train.precision={precision}",
            "optimizer.lr=1e-4",
            "optimizer.grad_clip=1.0",
        )
        for config, precision in [
            ("zero0", "fp32"),
            # One class of DeepSpeed's with ZeRO-1.
            ("zero2", "bf16"),
            ("zero3", "fp32"),
            ("zero2_offload", "fp32"),
        ]
    }
    expected = dict.fromkeys(runs, [True] * 4 + [False, True])
    assert run_ranks(_spike_under_each_stage, 2, runs) == [expected, expected]


def test_a_transformers_spike_too(codes: str, tmp_path: Path) -> None:
    before = f"""
{EARLY}
from ibq_scale.train.ar_task import ARTask
train_step = ARTask.train_step
def planted(self, batches):
    self.number = getattr(self, "number", 0) + 1
    # One micro-batch a step.
    hook = self.engine.module.register_forward_hook(lambda _, __, out: out * 100 if self.number == 5 else out)
    step = train_step(self, batches)
    hook.remove()
    return step
ARTask.train_step = planted
"""
    run = tmp_path / "ar"
    more = (*SMALL_AR, "train.steps=7", "train.global_batch=8", "train.micro_batch=4", "train.log_every=1")
    command = ["train", "ar", "tiny", f"data.train={codes}", f"out={run}", *more, "train.skip_spikes=8"]
    for rank in commands([*command, "data.workers=0"], 2, before):
        assert rank.wait() == 0, rank.said()
    assert [line["skipped"] for line in lines(run)] == [0.0] * 4 + [1.0, 0.0, 0.0]
