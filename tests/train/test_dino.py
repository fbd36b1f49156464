"""Training against a frozen DINO and towards frozen features: ranks, accumulation, ZeRO, restarts, missing weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ibq_scale.checkpoint.files import write_all
from ibq_scale.config.run import TokenizerRun
from ibq_scale.data.sets import DataSets
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from tests.ranks import run_ranks
from tests.train.reference import (
    assert_same,
    draw_images,
    image_batches,
    tokenizer_run,
    tokenizer_state,
    train_tokenizers,
)

DINO = ("discriminator.kind=dino", "discriminator.backbone=tiny", "discriminator.input_side=48", "train.global_batch=8")
BOTH = (*DINO, "loss.features=tiny", "loss.feature_weight=0.5", "optimizer.lr=1e-3")


def _train(task: Any, run: TokenizerRun, world: World, steps: range) -> None:
    for step in steps:
        task.set_rates(step * run.train.global_batch)
        images = draw_images(0, step, run.train.global_batch)
        task.train_step(iter(image_batches(images, world.rank, world.size)))


def _again(rank: int, size: int, runs: dict[str, TokenizerRun], folder: Path) -> list[str]:
    """Names of the runs that end in other bits after a restart. With what a checkpoint holds, on the way."""
    from ibq_scale.train.tokenizer_task import TokenizerTask

    world = World(rank, size, rank, torch.device("cpu"))
    different = []
    for name, run in runs.items():
        task = TokenizerTask(run, world, DataSets((), run.data))
        names = [n for n, _ in task.discriminator.module.named_parameters()]
        assert all(n.startswith("discriminator.heads.") for n in names)
        _train(task, run, world, range(2))
        write_all(task.state(), folder / name)
        dist.barrier()
        _train(task, run, world, range(2, 3))
        restarted = TokenizerTask(run, world, DataSets((), run.data))
        restarted.load(folder / name)
        _train(restarted, run, world, range(2, 3))
        state, again = tokenizer_state(task, world), tokenizer_state(restarted, world)
        if not all(torch.equal(value, again[key]) for key, value in state.items()):
            different.append(name)
    return different


@pytest.mark.slow
@pytest.mark.distributed
def test_a_restart_goes_on_in_the_same_bits(tmp_path: Path) -> None:
    from ibq_scale.checkpoint.pieces import WEIGHTS, PieceReader

    runs = {
        f"{config}-{precision}": tokenizer_run(config, *BOTH, f"train.precision={precision}")
        for config, precision in (("zero0", "fp32"), ("zero2", "bf16"))
    }
    assert run_ranks(_again, 2, runs, tmp_path) == [[], []]
    saved = PieceReader(tmp_path / "zero2-bf16" / "discriminator").tensors(WEIGHTS)
    assert {name.split(".")[1] for name in saved} == {"heads"}
    assert {name.split(".")[0] for name in PieceReader(tmp_path / "zero2-bf16" / "ema").tensors()} == {
        "autoencoder",
        "alignment",
    }


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_accumulation_and_zero_change_nothing() -> None:
    """Augmentation included: its random numbers belong to a micro-batch's position."""
    runs = {
        config: tokenizer_run(config, *BOTH, "loss.l1_weight=0", "loss.l2_weight=1")
        for config in ("zero0", "zero2", "zero3")
    }
    draws, plain = dict.fromkeys(runs, 0), runs.pop("zero0")
    alone = run_ranks(train_tokenizers, 1, {"alone": plain}, {"alone": 0})[0]["alone"]
    found = run_ranks(train_tokenizers, 2, runs, draws)[0]
    start = _start(plain)
    for name, weights in found.items():
        assert_same(weights, {key: torch.from_numpy(value) for key, value in alone.items()}, name)
    moved = {key for key, value in start.items() if not torch.allclose(value, torch.from_numpy(alone[key]), atol=1e-5)}
    assert {"alignment.projection.0.weight", "discriminator.heads.4.last.weight"} <= moved


def _start(run: TokenizerRun) -> dict[str, torch.Tensor]:
    """Some weights before training."""
    from ibq_scale.losses.frozen_vit import backbone_of, sizes_of
    from ibq_scale.models.aligned import AlignedTokenizer
    from ibq_scale.models.discriminator import make_discriminator

    torch.manual_seed(run.train.seed)
    model = AlignedTokenizer(run.model, run.quantizer, sizes_of("dinov2", "tiny").width)
    judge = make_discriminator(run.discriminator, backbone_of(run.discriminator, torch.device("cpu"), torch.float32))
    named = dict(model.named_parameters()) | {f"discriminator.{k}": v for k, v in judge.named_parameters()}
    return {name: value.detach() for name, value in named.items()}


def _refused(rank: int, size: int, run: TokenizerRun, folder: str) -> tuple[str, int]:
    """The error, and how many engines were made before it."""
    import os

    from ibq_scale.train import tokenizer_task

    os.environ["IBQ_SCALE_WEIGHTS"] = folder
    made: list[int] = []
    vars(tokenizer_task)["make_engine"] = lambda *_: made.append(1)
    with pytest.raises(UserError) as caught:
        tokenizer_task.TokenizerTask(run, World(rank, size, rank, torch.device("cpu")), DataSets((), run.data))
    return str(caught.value), len(made)


@pytest.mark.slow
@pytest.mark.distributed
def test_missing_weights_are_refused_on_every_rank_before_any_engine(tmp_path: Path) -> None:
    for words, file in (
        (("discriminator.kind=dino",), "dino_deitsmall16_pretrain.pth"),
        (("loss.features=dinov2",), "dinov2_vits14_pretrain.pth"),
    ):
        for error, engines in run_ranks(
            _refused, 2, tokenizer_run("zero2", *words, "train.global_batch=8"), str(tmp_path)
        ):
            assert f"{file} is not in {tmp_path}: run 'ibq-scale fetch-weights" in error
            assert engines == 0
