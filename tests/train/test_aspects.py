"""A tokenizer trained on several aspects is the same run on any ranks, and after a restart within an epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ibq_scale.checkpoint.files import write_all
from ibq_scale.checkpoint.reading import Checkpoint
from ibq_scale.config.run import TokenizerRun
from ibq_scale.data.prepare import prepare_images
from ibq_scale.data.sets import open_sets
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.supervise.compatible import check_same_run
from tests.ranks import run_ranks
from tests.train.reference import tokenizer_run

ASPECTS, BATCH, HALF, END = ("1:1", "4:3"), 4, 3, 6


def _train(rank: int, size: int, run: TokenizerRun, folder: Path, first: int) -> list[tuple[tuple[int, ...], float]]:
    """The pictures' shape and the mean loss of each step from `first` on. Saves at half."""
    from ibq_scale.train.tokenizer_task import TokenizerTask

    world = World(rank, size, rank, torch.device("cpu"))
    task = TokenizerTask(run, world, open_sets(run.data, "images", BATCH))
    if first:
        task.load(folder)
    batches = task.batches(first * BATCH)
    found = []
    for step in range(first, END):
        task.set_rates(step * BATCH)
        loss = task.train_step(batches).metrics["loss"]
        dist.all_reduce(loss)
        assert task._last is not None
        images, shown = task._last
        assert shown.shape == images.shape
        found.append((tuple(images.shape[1:]), float(loss) / size))
        if step + 1 == HALF and not first:
            write_all(task.state(), folder)
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_of_several_aspects_goes_on_on_other_ranks(pictures: Path, tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    prepare_images(pictures, data, aspects=ASPECTS)
    words = (f"data.train={data}", f"data.aspects=[{','.join(ASPECTS)}]", f"train.global_batch={BATCH}")
    # A frozen encoder's features: one for each token of any shape. And a discriminator without BatchNorm, since ranks
    # and micro-batches divide a step otherwise.
    words += ("loss.features=tiny", "discriminator.kind=dino", "discriminator.backbone=tiny")
    words += ("discriminator.input_side=32", "discriminator.augment=[]", "train.micro_batch=2", "data.workers=0")
    run = tokenizer_run("zero2", *words)
    two = run_ranks(_train, 2, run, tmp_path / "checkpoint", 0)[0]
    shapes = [shape for shape, _ in two]
    assert set(shapes) == {(3, 16, 16), (3, 14, 18)}
    assert {shapes[HALF - 1], shapes[HALF]} == set(shapes), "the checkpoint is between two aspects"
    one = run_ranks(_train, 1, run, tmp_path / "checkpoint", HALF)[0]
    assert [shape for shape, _ in one] == shapes[HALF:]
    saved = run.model_dump(mode="json")
    squares = run.model_copy(update={"data": run.data.model_copy(update={"aspects": ()})})
    with pytest.raises(UserError, match=r"data\.aspects was \['1:1', '4:3'\]; the order of samples depends on it"):
        check_same_run(squares, Checkpoint(tmp_path, {"config": saved}))
    # Checkpoints of earlier releases have squares.
    del saved["data"]["aspects"]
    check_same_run(squares, Checkpoint(tmp_path, {"config": saved}))
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in two[HALF:]], rel=1e-4)
