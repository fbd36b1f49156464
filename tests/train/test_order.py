"""Training in random orders: the same on any ranks and after a restart, and a plain raster model on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ibq_scale.checkpoint.pieces import PieceReader
from ibq_scale.config.layers import resolve
from ibq_scale.config.run import ARRun
from ibq_scale.data.sets import open_sets
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.pretrained.exporting import export
from ibq_scale.pretrained.loading import load_ar
from ibq_scale.pretrained.published import export_published
from ibq_scale.train.schedule import random_order_share
from tests.ranks import run_ranks
from tests.train.reference import ar_losses, ar_run

ANNEALED = (
    "model.order=annealed",
    "train.steps=6",
    "schedule.order_anneal_start=0.2",
    "schedule.order_anneal_end=0.8",
)


def test_the_share_of_random_orders_falls_between_the_two_points() -> None:
    run = ar_run("none", "model.order=annealed", "train.steps=100")
    shares = [random_order_share(run, position) for position in (0, 400, 450, 500, 599, 600, 799)]
    assert shares == [1.0, 1.0, 0.75, 0.5, pytest.approx(0.005), 0.0, 0.0]
    at_once = ar_run("none", "model.order=annealed", "train.steps=100", "schedule.order_anneal_start=0.75")
    assert [random_order_share(at_once, position) for position in (599, 600)] == [1.0, 0.0]
    assert random_order_share(ar_run("none"), 0) == 0.0
    assert random_order_share(ar_run("none", "model.order=random"), 10**9) == 1.0
    with pytest.raises(UserError, match=r"order_anneal_start \(0.8\) comes after order_anneal_end \(0.75\)"):
        resolve("ar/tiny", ["data.train=none", "schedule.order_anneal_start=0.8"])


@pytest.mark.slow
@pytest.mark.distributed
def test_orders_do_not_depend_on_ranks_or_restarts(codes: str, tmp_path: Path) -> None:
    """Two ranks of every ZeRO stage, stopped in the middle of the annealing, and one rank without a stop."""
    runs = {f"zero{n}": ar_run(codes, *ANNEALED, f"deepspeed.config=zero{n}", "ema_decay=0.9") for n in (1, 2, 3)}
    plain = {
        name: runs["zero1"].model_copy(update={"model": runs["zero1"].model.model_copy(update=of)})
        for name, of in (("whole", {}), ("raster", {"order": "raster"}))
    }
    (expected,) = run_ranks(ar_losses, 1, plain, tmp_path, 0, 6)
    parts = [run_ranks(ar_losses, 2, runs, tmp_path, *steps)[0] for steps in ((0, 3), (3, 6))]
    for name in runs:
        assert parts[0][name] + parts[1][name] == pytest.approx(expected["whole"], rel=1e-4), name
    # The first step has other inputs than raster order, but the same loss: the head starts at zero.
    assert expected["whole"][1] != pytest.approx(expected["raster"][1], rel=1e-4)

    # At the end it is a plain raster model on disk, for older programs too.
    exported = tmp_path / "exported"
    export(tmp_path / "zero3-6", exported)
    assert "order" not in json.loads((exported / "config.json").read_text())["model"]
    loaded = load_ar(exported)
    assert loaded.config.order == "raster"
    assert not any("order" in name for name in loaded.state_dict())
    # Before the end it has the embedding at the scale of the next step's samples in raster order.
    export(tmp_path / "zero1-3", tmp_path / "between")
    scale = json.loads((tmp_path / "zero1-3/model/config.json").read_text())["order_scale"]
    assert scale == pytest.approx((0.8 - 3 / 6) / 0.6)
    between = load_ar(tmp_path / "between")
    assert between.config.order == "annealed"
    assert torch.equal(between.transformer.order_emb.weight, load_ar(tmp_path / "zero1-3").transformer.order_emb.weight)
    raw = PieceReader(tmp_path / "zero1-3" / "ema").tensors("")["order_emb.weight"]
    torch.testing.assert_close(between.transformer.order_emb.weight, raw * scale)
    with pytest.raises(UserError, match="has no order embedding: export a model of order=annealed from the end"):
        export_published(tmp_path / "between", tmp_path / "published")
    export_published(exported, tmp_path / "published")


def _weights(rank: int, size: int, runs: list[ARRun]) -> list[dict[str, Any]]:
    """The weights after three steps of each run."""
    from ibq_scale.train.ar_task import ARTask

    found = []
    for run in runs:
        task = ARTask(run, World(rank, size, rank, torch.device("cpu")), open_sets(run.data, "codes"))
        batches = task.batches(0)
        for step in range(3):
            task.set_rates(8 * step)
            task.train_step(batches)
        found.append({name: p.detach().numpy() for name, p in task.engine.module.named_parameters()})
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_an_annealed_run_at_its_end_trains_as_raster_to_the_last_bit(codes: str, tmp_path: Path) -> None:
    """With clipping and dropout, from the weights of an annealed checkpoint."""
    run_ranks(ar_losses, 1, {"first": ar_run(codes, *ANNEALED, "deepspeed.config=zero0")}, tmp_path, 0, 2)
    words = [
        f"init={tmp_path / 'first-2'}",
        "deepspeed.config=zero0",
        "model.token_dropout=0.1",
        "optimizer.grad_clip=0.1",
    ]
    off = ["schedule.order_anneal_start=0", "schedule.order_anneal_end=0"]
    runs = [ar_run(codes, *words), ar_run(codes, *words, "model.order=annealed", *off)]
    raster, annealed = run_ranks(_weights, 1, runs)[0]
    assert annealed.pop("order_emb.weight").any()
    assert raster.keys() == annealed.keys()
    for name, value in raster.items():
        assert (value == annealed[name]).all(), name
