"""Two engines, a codebook spread over ranks, any ZeRO stage: each step equals the plain one on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ibq_scale.config.run import TokenizerRun
from ibq_scale.data.sets import DataSets
from ibq_scale.distributed.world import World
from tests.ranks import run_ranks
from tests.train.reference import (
    PlainTokenizerTraining,
    assert_same,
    draw_images,
    image_batches,
    plain_tokenizer,
    tokenizer_run,
    tokenizer_state,
    train_tokenizers,
)


def _alignment(found: dict[str, Any], expected: dict[str, torch.Tensor], run: TokenizerRun) -> float:
    """Cosine of the directions in which all weights together have moved from their common start."""
    start = PlainTokenizerTraining(run)
    origin = dict(start.model.named_parameters()) | {"codebook": start.codebook_KD}
    moves = [
        torch.cat([(torch.as_tensor(after[k]).view_as(v) - v).flatten() for k, v in origin.items()]).detach()
        for after in (found, expected)
    ]
    return float(torch.nn.functional.cosine_similarity(moves[0], moves[1], dim=0))


# DeepSpeed config, ranks of a codebook group (0: both). The codebook is outside of the engines, so not every pair
# can fail by itself. test_elastic has a group of 2 of 4 ranks, and partitions that are not halves.
LAYOUTS = [
    ("zero0", 0),
    ("zero1", 1),
    ("zero2", 0),
    ("zero2", 1),
    ("zero3", 1),
    ("zero2_offload", 1),
    ("zero3_offload", 0),
]


@pytest.mark.slow
@pytest.mark.distributed
def test_every_zero_stage_and_codebook_group_equals_plain_torch() -> None:
    """Generator by ZeRO 0 to 3 and offloaded, discriminator by DDP or ZeRO-1, codebook in one group or replicated."""
    runs = {
        f"{config}, group {group}": tokenizer_run(config, "train.global_batch=8", f"codebook_group={group}")
        for config, group in LAYOUTS
    }
    run = next(iter(runs.values()))
    draw, expected = plain_tokenizer(run)
    moved = PlainTokenizerTraining(run)
    assert not torch.allclose(expected["codebook"], moved.codebook_KD, atol=1e-2), "nothing was trained"
    found = run_ranks(train_tokenizers, 2, runs, dict.fromkeys(runs, draw))[0]
    assert found.keys() == runs.keys()
    for name, weights in found.items():
        assert_same(weights, expected, name)


PAST_IBQ = ("quantizer.kind=vq", "quantizer.straight_through=dynamic", "quantizer.region=true")
# A step has 512 tokens: codes leave the window and come back.
PAST_IBQ += ("quantizer.region_window=600", "optimizer.codebook_lr=0.02")


@pytest.mark.slow
@pytest.mark.distributed
def test_local_entropy_and_vq_with_accumulation_too() -> None:
    runs = {
        "local entropy": tokenizer_run("zero2", "train.global_batch=4", "quantizer.entropy_scope=local"),
        "vq": tokenizer_run(
            "zero2", "train.global_batch=8", "quantizer.kind=vq", "loss.l2_weight=0.5", "optimizer.codebook_lr=0.02"
        ),
        "lfq": tokenizer_run("zero1", "train.global_batch=8", "quantizer.kind=lfq", "quantizer.dim=5"),
        "bf16": tokenizer_run("zero2", "train.global_batch=4", "train.precision=bf16"),
        "bf16, zero3": tokenizer_run("zero3", "train.global_batch=4", "train.precision=bf16"),
    }
    calls = dict.fromkeys(runs, 1) | {"local entropy": 2}
    plain = {name: plain_tokenizer(run, calls[name]) for name, run in runs.items()}
    found = run_ranks(train_tokenizers, 2, runs, {name: draw for name, (draw, _) in plain.items()})[0]
    # bf16 keeps 8 bits and so chooses another of two near codes now and then: no equality, but the same direction.
    for name in ("bf16", "bf16, zero3"):
        assert _alignment(found.pop(name), plain[name][1], runs[name]) > 0.5
    for name, weights in found.items():
        assert_same(weights, plain[name][1], name)


def _poison(rank: int, world_size: int, runs: dict[str, TokenizerRun]) -> dict[str, list[bool]]:
    """A step with NaN in rank 1's encoder, between two good ones: what was applied, and that it changed nothing."""
    from ibq_scale.train.tokenizer_task import TokenizerTask

    world = World(rank, world_size, rank, torch.device("cpu"))
    applied = {}
    for name, run in runs.items():
        task = TokenizerTask(run, world, DataSets((), run.data))
        bad = [False]
        conv: Any = task.generator.module.autoencoder.quant_conv
        conv.register_forward_hook(lambda _, __, out, bad=bad: out * (float("nan") if bad[0] else 1.0))
        steps = []
        for step in range(3):
            bad[0] = step == 1 and rank == 1
            task.set_rates(step * run.train.global_batch)
            before = tokenizer_state(task, world)
            steps.append(
                task.train_step(iter(image_batches(draw_images(0, step, run.train.global_batch), rank, world_size)))
            )
            unchanged = all(torch.equal(value, before[key]) for key, value in tokenizer_state(task, world).items())
            assert unchanged == (step == 1), (name, step)
        assert bool(steps[1].finite) == (rank == 0), name
        applied[name] = [step.applied for step in steps]
    return applied


@pytest.mark.slow
@pytest.mark.distributed
def test_nan_on_one_rank_is_applied_on_none_and_to_nothing() -> None:
    runs = {
        f"{config} {precision}, group {group}": tokenizer_run(
            config, "train.global_batch=8", f"codebook_group={group}", f"train.precision={precision}", *switches
        )
        for config, precision, group, switches in [
            ("zero0", "fp32", 0, ()),
            ("zero1", "bf16", 1, PAST_IBQ),
            ("zero2", "bf16", 0, ()),
            ("zero3", "fp32", 1, ()),
            ("zero2_offload", "fp32", 0, ()),
            ("zero3_offload", "bf16", 0, ()),
        ]
    }
    expected = {name: [True, False, True] for name in runs}
    assert run_ranks(_poison, 2, runs) == [expected, expected]
