"""What a run says first: all that one would otherwise look for in four files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ibq_scale.config.layers import resolve
from ibq_scale.data.sets import open_sets
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.train.startup_summary import startup_summary
from tests.samples import SMALL_AR, write_codes

FOUR = World(0, 4, 0, torch.device("cpu"))
HOSTS = ["gpu1", "gpu1", "gpu2", "gpu2"]


def _said(preset: str, world: World, *overrides: str) -> dict[str, list[str]]:
    """The lines by their section, the first line's as ''."""
    config = resolve(preset, overrides).config
    kind = "images" if config.task == "tokenizer" else "codes"
    first, *lines = startup_summary(
        config, world, HOSTS[: world.size], open_sets(config.data, kind), "starting"
    ).splitlines()
    assert len(lines) < 20, "no more than a screen"
    assert all(len(line) < 200 for line in lines), lines
    said, name = {"": [first]}, ""
    for line in lines:
        name = line[2:12].strip() or name
        said.setdefault(name, []).append(line[12:])
    return said


def test_of_a_tokenizer(dataset: str, tmp_path: Path) -> None:
    said = _said(
        "tokenizer/tiny", FOUR,
        f"data.train={dataset}", f"out={tmp_path}/run", "quantizer.codebook_size=1024", "quantizer.dim=16",
        "train.global_batch=16", "train.micro_batch=2", "train.steps=30", "codebook_group=2", "deepspeed.config=zero2",
        "train.mirror=s3://bucket/run", "tensorboard=true", "validation.data=/data/val", "validation.every=10",
        "dashboards=[boards:Mine]", "model.activation_checkpointing=true", "loss.perceptual=random",
    )  # fmt: skip
    assert said[""] == ["tokenizer-tiny: starting"]
    assert "encoder " in said["model"][0]
    assert "LPIPS random, frozen" in said["model"][0]
    assert "1,024 codes × 16 (16.38 k), ibq; activation checkpointing" in said["model"][1]
    assert said["data"][0].startswith(f"{dataset}: 24 images, 3 classes, ")
    assert said["data"][1] == "order 2: 8 lanes, windows of 4 shards; no cache"
    assert said["data"][2] == "validation /data/val: 5,000 at the most, every 10 steps"
    assert said["batch"] == ["16 = 2 micro × 2 accumulation × 4 ranks; 30 steps, 480 images (20.0 epochs)"]
    assert said["ranks"] == ["4 on 2 nodes (CPU); fp32, DeepSpeed zero2 (ZeRO-2); the codebook over groups of 2"]
    assert said["memory"][0].startswith("states ")
    assert f"{tmp_path}/run: metrics.jsonl" in said["files"][0]
    assert "copied to s3://bucket/run" in said["files"][1]
    assert said["files"][2] == "TensorBoard; boards:Mine"


def test_of_a_transformer(tmp_path: Path) -> None:
    write_codes(tmp_path / "codes")
    world = World(0, 1, 0, torch.device("cpu"))
    words = [*SMALL_AR, f"data.train={tmp_path / 'codes'}", f"out={tmp_path}/run", "train.global_batch=12"]
    words += ["train.micro_batch=12", "model.activation_checkpointing=selective"]
    said = _said("ar/tiny", world, *words)
    assert said["model"][1] == (
        "2 blocks × 32, 2 heads; 16 tokens of 40 codes, 3 classes; attention sdpa (torch); activation checkpointing, "
        "selective"
    )
    assert said["ranks"] == ["1 on 1 node (CPU); fp32, DeepSpeed zero1 (ZeRO off: one rank has nothing to share)"]
    assert said["data"] == [
        f"{tmp_path / 'codes'}: 60 codes, 3 classes, 3 shards, 0.00 MB",
        "order 2: 8 lanes, windows of 4 shards; no cache",
    ]
    by_muon = _said("ar/tiny", world, *words, "optimizer.kind=muon")["model"]
    assert by_muon[2] == "Muon steps 57.34 k in matrices of the blocks, AdamW the rest"
    with pytest.raises(UserError, match=r"model\.attention=flash3 needs a CUDA device, this is cpu"):
        _said("ar/tiny", world, *words, "model.attention=flash3")


@pytest.mark.slow
def test_the_memory_is_that_of_the_plan(dataset: str, tmp_path: Path) -> None:
    from ibq_scale.scaling.plan import Machine, make_plan

    words = [f"data.train={dataset}", f"out={tmp_path}/run", "train.micro_batch=4"]
    plan = make_plan(resolve("tokenizer/tiny", words).config, Machine(gpus=2, nodes=2), mfu=0.4)
    passes = ("activations", "quantizer's work", "fragmentation", "CUDA, ")
    states = sum(line.passes for line in plan.memory.lines if not line.name.startswith(passes))
    said = _said("tokenizer/tiny", FOUR, *words)
    assert said["memory"][0].startswith(f"states {states / 1e6:,.2f} MB a rank (")
