"""A /dev/shm that is too small is told before the first batch, and a batch that does not fit at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from ibq_scale.config.run import DataConfig
from ibq_scale.data import shared_memory
from ibq_scale.data.sets import open_sets
from ibq_scale.data.shared_memory import SharedMemoryError, require_room, share
from ibq_scale.data.stream import image_stream
from ibq_scale.errors import UserError

MIB = 1 << 20


def _statvfs(free: int) -> object:
    return lambda path: SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)


def test_the_room_is_that_of_all_ranks_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", _statvfs(64 * MIB))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    require_room(MIB, 64)
    with pytest.raises(UserError, match=r"has 67\.11 MB free, and the batches of 1 ranks' data workers take 68\.16 MB"):
        require_room(MIB, 65)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"8 ranks' data workers take 75\.50 MB"):
        require_room(MIB, 9)


def test_a_stream_looks_before_it_starts_workers(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", _statvfs(MIB))
    shape = dict.fromkeys(("seed", "rank", "start"), 0) | {"resolution": 256, "world_size": 1, "micro_batch": 2}
    with pytest.raises(UserError, match=r"/dev/shm has 1\.05 MB free"):
        image_stream(open_sets(DataConfig(train=dataset, workers=2), "images"), **shape)
    image_stream(open_sets(DataConfig(train=dataset, workers=0), "images"), **shape)


def test_a_batch_that_does_not_fit_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)\nand a trace")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(SharedMemoryError, match=r"cannot hand over its batch through /dev/shm \(unable .*\(28\)\):"):
        share((torch.zeros(2), "text"))


def test_what_is_shared_is_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch: Sequence[object] = (torch.arange(6).view(2, 3).t(), "text")
    share(tuple(batch))
    assert isinstance(batch[0], torch.Tensor)
    assert batch[0].is_shared()
    assert batch[0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert shared_memory.FOLDER.is_dir()
