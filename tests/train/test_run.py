"""How the ranks of a training open its data."""

from __future__ import annotations

from pathlib import Path

import torch

from ibq_scale.config.layers import resolve
from ibq_scale.data.manifest import Manifest, save_manifest
from ibq_scale.data.shards import ShardInfo
from ibq_scale.data.store import open_store
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.train.run import _open_sets
from tests.ranks import run_ranks


def _samples(rank: int, size: int, folders: list[Path]) -> int | str:
    """The samples that a rank sees in its folder, or its error. Nodes have two ranks."""
    world = World(rank, size, rank % 2, torch.device("cpu"))
    run = resolve("ar/tiny", [f"data.train={folders[rank]}"]).config
    try:
        return _open_sets(run, "codes", world).samples
    except UserError as e:
        return str(e)


def _set(folder: Path, samples: int) -> Path:
    shard = ShardInfo(name="codes-0.safetensors", samples=samples, bytes=1, sha256="0" * 64)
    save_manifest(open_store(str(folder)), Manifest(kind="codes", shards=(shard,), classes=()))
    return folder


def test_one_rank_of_a_node_reads_the_manifests(tmp_path: Path) -> None:
    first, copy, other = _set(tmp_path / "a", 7), _set(tmp_path / "b", 7), _set(tmp_path / "c", 8)
    missing = tmp_path / "missing"
    assert run_ranks(_samples, 4, [first, missing, copy, missing]) == [7] * 4
    differing = run_ranks(_samples, 4, [first, missing, other, missing])
    assert all("rank 2 sees other data" in str(found) for found in differing)
    assert all(f"{missing} has no manifest" in str(found) for found in run_ranks(_samples, 2, [missing, first]))
