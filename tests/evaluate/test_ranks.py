"""One, two and four ranks measure the same, to the last bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ibq_scale.distributed.world import World
from ibq_scale.evaluate import generation, reconstruction, reference
from ibq_scale.evaluate.generation import evaluate_generation
from ibq_scale.evaluate.reconstruction import evaluate_reconstruction
from ibq_scale.evaluate.reference import write_reference
from ibq_scale.losses.perceptual import Perceptual
from tests.evaluate.stand_in import QuickInception
from tests.ranks import run_ranks

TIMES = {"seconds", "images_per_s"}


class _RandomPerceptual(Perceptual):
    """LPIPS' layers over random features."""

    def __init__(self, net: str, device: torch.device) -> None:
        super().__init__("random", device)


def _measure(rank: int, world_size: int, checkpoint: str, data: str, samples: str, to: str) -> dict[str, Any]:
    for module in (generation, reconstruction, reference):
        module.Inception = QuickInception
    reconstruction.missing = lambda file: None
    reconstruction.Perceptual = _RandomPerceptual
    world = World(rank, world_size, rank, torch.device("cpu"))
    folder = Path(to) / str(world_size)
    stamp = write_reference(data, folder / "real.npz", (32, 32), world, batch=5, features=9)
    torch.distributed.barrier()
    return {
        "crops": dataclasses.asdict(
            evaluate_reconstruction(checkpoint, data, world, batch=5, to=folder / "crops", conventions="all")
        ),
        "native": dataclasses.asdict(
            evaluate_reconstruction(checkpoint, data, world, batch=5, native=True, pixels="float", limit=6)
        ),
        "stamp": dataclasses.asdict(stamp) | {"hash": stamp.hash},
        "samples": dataclasses.asdict(evaluate_generation(samples, f"{folder}/real.npz", world, batch=4)),
        "folders": dataclasses.asdict(evaluate_generation(samples, samples, world, batch=4, conventions="all")),
    }


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 PNG files of 32 × 32."""
    folder = tmp_path_factory.mktemp("samples")
    random = np.random.default_rng(1)
    for i in range(23):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        (folder / str(i % 3)).mkdir(exist_ok=True)
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / str(i % 3) / f"{i:03d}.png")
    return folder


@pytest.mark.slow
@pytest.mark.distributed
def test_figures_do_not_depend_on_the_ranks(tokenizer_dir: Path, dataset: str, samples: Path, tmp_path: Path) -> None:
    first: dict[str, Any] = {}
    for world in (1, 2, 4):
        for found in run_ranks(_measure, world, str(tokenizer_dir), dataset, str(samples), str(tmp_path)):
            for row in (found["samples"], *found["samples"]["conventions"]):
                row.pop("reference")
            plain = {what: {k: v for k, v in values.items() if k not in TIMES} for what, values in found.items()}
            first = first or plain
            assert plain == first
    assert first["crops"]["images"] == 24
    assert first["crops"]["rfid"] > 0
    assert first["native"]["images"] == 6
    assert first["native"]["resolution"] is None
    assert first["native"]["psnr"] != first["crops"]["psnr"]
    assert first["samples"]["reference_hash"] == first["stamp"]["hash"]
    assert first["samples"]["reference_features"] == 9
    assert first["samples"]["fid"] > 1e-3
    assert first["samples"]["inception_score"] > 1
    assert first["folders"]["fid"] == pytest.approx(0, abs=1e-3)
    assert (first["folders"]["precision"], first["folders"]["recall"]) == (1.0, 1.0)
    tables = [(tmp_path / str(world) / "crops" / "images.jsonl").read_text() for world in (1, 2, 4)]
    assert len(set(tables)) == 1
    rows = [json.loads(line) for line in tables[0].splitlines()]
    assert [row["position"] for row in rows] == list(range(24))
    assert np.mean([row["psnr"] for row in rows]) == pytest.approx(first["crops"]["psnr"], rel=1e-12)
    assert rows[0].keys() == {"position", "shard", "row", "psnr", "ssim", "lpips", "lpips_alex"}
    result = json.loads((tmp_path / "4" / "crops" / "reconstruction.json").read_text())
    assert {name: result[name] for name in first["crops"]} == first["crops"]
    assert result["model"] == str(tokenizer_dir)
    with Image.open(tmp_path / "4" / "crops" / "worst.png") as sheet:
        assert sheet.width > 5 * 2 * 32
    assert not list(tmp_path.rglob("*.partial"))
