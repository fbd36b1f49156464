"""A stream that leaves a sample out, or brings it twice, is found out at the epoch's end, on all ranks together."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ibq_scale.checkpoint.files import write_all
from ibq_scale.config.run import DataConfig
from ibq_scale.data.prepare import prepare_images
from ibq_scale.data.sets import DataSets, open_sets
from ibq_scale.distributed.world import World
from ibq_scale.supervise.epoch_audit import EpochAudit, NotOnceError
from tests.ranks import run_ranks

MICRO, SEED, BATCH = 2, 7, 12


def _world(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"))


def _take(once: EpochAudit, sets: DataSets, world: World, start: int, stop: int) -> None:
    """Notes this rank's micro-batches of the positions [start, stop)."""
    order = sets.order(SEED)
    for first in range(start + world.rank * MICRO, stop, world.size * MICRO):
        once.note(torch.tensor([(p, *order.locate(p)) for p in range(first, first + MICRO)]))


def _three_epochs_and_a_half(rank: int, size: int, config: DataConfig, folder: Path) -> None:
    world, sets = _world(rank, size), open_sets(config, "images", BATCH)
    samples = sets.samples * 7 // 2
    once = EpochAudit(sets, SEED, world)
    for start in range(0, samples, 12):
        _take(once, sets, world, start, start + 12)
        once.check(start + 12)
    write_all(once.state(), folder)


def _the_rest(rank: int, size: int, config: DataConfig, folder: Path, lost: bool) -> list[str]:
    """From the checkpoint to the end of the fourth epoch; rank 0 perhaps gets a batch a second time and not its own."""
    world, sets = _world(rank, size), open_sets(config, "images", BATCH)
    once = EpochAudit(sets, SEED, world)
    once.load(folder)
    start, stop = sets.samples * 7 // 2, sets.samples * 4
    if lost and rank == 0:
        _take(once, sets, World(1, size, 1, torch.device("cpu")), start, stop)
    else:
        _take(once, sets, world, start, stop)
    try:
        once.check(stop)
    except NotOnceError as e:
        return [str(e)]
    return []


@pytest.mark.distributed
@pytest.mark.parametrize(("weights", "aspects"), [((), ()), ((3.0, 1.0), ()), ((), ("1:1", "4:3"))])
def test_epochs_are_added_up_over_ranks_and_restarts(
    pictures: Path, tmp_path: Path, weights: tuple[float, ...], aspects: tuple[str, ...]
) -> None:
    """Of 3 and then 2 ranks; sources with weights and aspects have epochs of their own, which end within a batch."""
    first, second = tmp_path / "first", tmp_path / "second"
    prepare_images(pictures, str(first), shard_bytes=8_000, aspects=aspects)
    shutil.copytree(first, second)
    config = DataConfig(train=(str(first), str(second)), weights=weights, aspects=aspects, lanes=3, window=2)
    run_ranks(_three_epochs_and_a_half, 3, config, tmp_path)
    assert run_ranks(_the_rest, 2, config, tmp_path, False) == [[], []]
    found = run_ranks(_the_rest, 2, config, tmp_path, True)
    assert found[0] == found[1]
    assert "do all ranks read the same data?" in found[0][0]


@pytest.mark.distributed
def test_a_lost_batch_changes_the_count(dataset: str) -> None:
    assert run_ranks(_lose_one, 1, DataConfig(train=dataset, lanes=3)) == [True]


def _lose_one(rank: int, size: int, config: DataConfig) -> bool:
    world, sets = _world(rank, size), open_sets(config, "images")
    once = EpochAudit(sets, SEED, world)
    _take(once, sets, world, 0, sets.samples - MICRO)
    with pytest.raises(NotOnceError, match=r"epoch 0 of .*: 22 samples came, 24 different ones were expected"):
        once.check(sets.samples)
    return True
