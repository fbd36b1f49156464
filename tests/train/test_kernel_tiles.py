"""The record of the kernels' tiles in a run's directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.distributed.world import World
from ibq_scale.quantize import tiles
from ibq_scale.train import determinism
from ibq_scale.train.determinism import settle_tiles


def test_the_first_rank_writes_it_and_a_restart_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def settle(record: dict[str, Any], *how: Any) -> dict[str, Any]:
        asked.append((dict(record), how))
        return record | {"sums sm_90 bf16 64": [1, 2, 3, 4, 5]}

    monkeypatch.setattr(determinism, "choose", lambda *_: "triton")
    monkeypatch.setattr(determinism.dist, "barrier", lambda: None)
    monkeypatch.setattr(tiles, "settle", settle)
    quantizer, cuda = QuantizerConfig(dim=64, logit_precision="bf16"), torch.device("cuda")
    settle_tiles(tmp_path, quantizer, World(0, 2, 0, cuda))
    settle_tiles(tmp_path, quantizer, World(1, 2, 1, cuda))
    record = {"sums sm_90 bf16 64": [1, 2, 3, 4, 5]}
    assert json.loads((tmp_path / "tiles.json").read_text()) == record
    assert asked == [(known, ("bf16", 64, cuda)) for known in ({}, record, record)]


def test_there_is_none_without_kernels(tmp_path: Path) -> None:
    settle_tiles(tmp_path, QuantizerConfig(), World(0, 1, 0, torch.device("cpu")))
    settle_tiles(tmp_path, QuantizerConfig(kind="vq"), World(0, 1, 0, torch.device("cuda")))
    assert list(tmp_path.iterdir()) == []
