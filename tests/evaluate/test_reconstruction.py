"""Reconstruction figures are what they are defined as (on several ranks: test_ranks.py)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ibq_scale.data.stream import evaluation_images, to_float
from ibq_scale.distributed.world import World
from ibq_scale.evaluate.pixels import psnr, ssim
from ibq_scale.evaluate.reconstruction import evaluate_reconstruction
from ibq_scale.pictures import to_uint8
from ibq_scale.pretrained.loading import load_tokenizer
from tests.ranks import run_ranks


def _evaluate(rank: int, world_size: int, checkpoint: str, data: str, weights: str) -> dict[str, Any]:
    import os

    os.environ["IBQ_SCALE_WEIGHTS"] = weights
    world = World(rank, world_size, rank, torch.device("cpu"))
    return dataclasses.asdict(evaluate_reconstruction(checkpoint, data, world, batch=5))


@pytest.mark.distributed
def test_figures_are_the_definition(tokenizer_dir: Path, dataset: str, tmp_path: Path) -> None:
    [found] = run_ranks(_evaluate, 1, str(tokenizer_dir), dataset, str(tmp_path))
    tokenizer = load_tokenizer(tokenizer_dir)
    batch, _ = next(evaluation_images(dataset, resolution=32, rank=0, world_size=1, batch=24))
    codes = tokenizer.encode(to_float(batch.images_u8))
    decoded = to_uint8(tokenizer.decode(codes))
    assert found["images"] == 24
    assert found["psnr"] == pytest.approx(float(psnr(batch.images_u8, decoded).mean()), rel=1e-4)
    assert found["ssim"] == pytest.approx(float(ssim(batch.images_u8, decoded).mean()), rel=1e-4)
    p = torch.bincount(codes.flatten(), minlength=64).double() / codes.numel()
    assert found["usage"] == pytest.approx(float((p > 0).double().mean()), abs=1 / 64)
    assert found["perplexity"] == pytest.approx(float(torch.special.entr(p).sum().exp()), rel=1e-3)
    assert (found["lpips"], found["lpips_alex"], found["rfid"]) == (None, None, None)
    assert "vgg16-397923af.pth is not in" in found["not_measured"]["lpips"]
    assert "alexnet-owt-7be5be79.pth is not in" in found["not_measured"]["lpips_alex"]
    assert "inception" in found["not_measured"]["rfid"]
