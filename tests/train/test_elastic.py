"""A run goes on under any layout: other ranks, another ZeRO stage, another codebook group, offloaded or not."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ibq_scale.checkpoint.files import write_all
from ibq_scale.config.run import ARRun, TokenizerRun
from ibq_scale.data.sets import DataSets, open_sets
from ibq_scale.distributed.world import World
from ibq_scale.zero.master_weights import shapes
from tests.ranks import run_ranks
from tests.train.reference import (
    ar_run,
    assert_same,
    draw_images,
    gather,
    image_batches,
    plain_tokenizer,
    plain_transformer,
    smooth_leaky_relu,
    tokenizer_run,
    tokenizer_state,
    whole_weights,
)

GLOBAL = 24
# Ranks, generator and transformer by, ranks of a codebook group; each trains two steps from the checkpoint before.
CHAIN = [(4, "zero1", 0), (2, "zero3", 1), (3, "zero2", 1), (1, "zero0", 0), (4, "zero3_offload", 2)]
LEG = 2
STEPS = len(CHAIN) * LEG


def _tokenizer(rank: int, size: int, run: TokenizerRun, draw: int, folder: Path, leg: int) -> dict[str, Any]:
    from ibq_scale.train.tokenizer_task import TokenizerTask

    torch.nn.LeakyReLU.forward = smooth_leaky_relu
    world = World(rank, size, rank, torch.device("cpu"))
    task = TokenizerTask(run, world, DataSets((), run.data))
    if leg:
        task.load(folder / f"tokenizer-{leg - 1}")
    for step in range(leg * LEG, (leg + 1) * LEG):
        task.set_rates(step * GLOBAL)
        task.train_step(iter(image_batches(draw_images(draw, step, GLOBAL), rank, size)))
    write_all(task.state(), folder / f"tokenizer-{leg}")
    rows = [torch.empty_like(task.codebook.rows.detach()) for _ in range(size)]
    dist.all_gather(rows, task.codebook.rows.detach())
    weights = whole_weights(task.generator, world) | whole_weights(task.discriminator, world)
    weights |= {f"ema.{k}": v for k, v in (gather(task.ema.pieces(), shapes(task.generator), world) or {}).items()}
    weights |= {"codebook": torch.cat(rows[: task.codebook.group_size]), "ema_fake": task.lecam.fake}
    return {k: v.numpy() for k, v in weights.items()}


def _ar(rank: int, size: int, run: ARRun, folder: Path, leg: int) -> list[float]:
    from ibq_scale.train.ar_task import ARTask

    task = ARTask(run, World(rank, size, rank, torch.device("cpu")), open_sets(run.data, "codes"))
    if leg:
        task.load(folder / f"ar-{leg - 1}")
    batches = task.batches(leg * LEG * GLOBAL)
    losses = []
    for step in range(leg * LEG, (leg + 1) * LEG):
        task.set_rates(step * GLOBAL)
        loss = task.train_step(batches).metrics["loss"]
        dist.all_reduce(loss)
        losses.append(float(loss) / size)
    write_all(task.state(), folder / f"ar-{leg}")
    return losses


def _both(
    rank: int, size: int, tokenizer: TokenizerRun, draw: int, ar: ARRun, folder: Path, leg: int
) -> tuple[dict[str, Any], list[float]]:
    return _tokenizer(rank, size, tokenizer, draw, folder, leg), _ar(rank, size, ar, folder, leg)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_chain_of_layouts_is_one_run(codes: str, tmp_path: Path) -> None:
    """4 → 2 → 3 → 1 → 4 ranks and every ZeRO stage on the way: the weights are those of an unbroken plain run."""
    words = f"train.global_batch={GLOBAL}"
    draw, expected = plain_tokenizer(tokenizer_run("zero0", words), steps=STEPS)
    losses: list[float] = []
    for leg, (size, config, group) in enumerate(CHAIN):
        tokenizer = tokenizer_run(config, words, f"codebook_group={group}")
        ar = ar_run(codes, f"deepspeed.config={config}", words, "ema_decay=0.9")
        weights, found = run_ranks(_both, size, tokenizer, draw, ar, tmp_path, leg)[0]
        losses += found
    assert_same(weights, expected, "the chain")
    assert losses == pytest.approx(plain_transformer(ar_run(codes, words), STEPS)[1], rel=1e-4)
    assert all(later < earlier for earlier, later in pairwise(losses[:3]))


def _again(rank: int, size: int, runs: dict[str, TokenizerRun], folder: Path) -> list[str]:
    """Names of the layouts under which a step after a checkpoint ends in other bits than one without it."""
    from ibq_scale.train.tokenizer_task import TokenizerTask

    world = World(rank, size, rank, torch.device("cpu"))
    different = []
    for name, run in runs.items():
        task = TokenizerTask(run, world, DataSets((), run.data))

        def train(task: Any, first: int, last: int, run: TokenizerRun = run) -> None:
            for step in range(first, last):
                task.set_rates(step * run.train.global_batch)
                task.train_step(iter(image_batches(draw_images(0, step, run.train.global_batch), rank, size)))

        train(task, 0, 2)
        write_all(task.state(), folder / name)
        dist.barrier()
        train(task, 2, 3)
        restarted = TokenizerTask(run, world, DataSets((), run.data))
        restarted.load(folder / name)
        train(restarted, 2, 3)
        state, again = tokenizer_state(task, world), tokenizer_state(restarted, world)
        # Running means are rank 0's on all ranks after a restart; training does not read them.
        if not all(torch.equal(value, again[key]) for key, value in state.items() if not key.startswith("buffer")):
            different.append(name)
    return different


@pytest.mark.slow
@pytest.mark.distributed
def test_the_same_layout_goes_on_in_the_same_bits(tmp_path: Path) -> None:
    layouts = [
        ("zero0", "fp32", 0),
        # One class of DeepSpeed's with ZeRO-2.
        ("zero1", "fp32", 1),
        ("zero2", "bf16", 0),
        ("zero3", "fp32", 0),
        ("zero3", "bf16", 1),
        ("zero2_offload", "bf16", 0),
        ("zero3_offload", "fp32", 0),
    ]
    runs = {
        f"{config}-{precision}": tokenizer_run(
            config,
            "train.global_batch=8",
            f"train.precision={precision}",
            f"codebook_group={group}",
            "optimizer.lr=1e-3",
        )
        for config, precision, group in layouts
    }
    assert run_ranks(_again, 2, runs, tmp_path) == [[], []]
