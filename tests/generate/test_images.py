"""Sampled images: the same ones on any number of ranks, in the layout that evaluators read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibq_scale.cli.sample import parse_classes
from ibq_scale.distributed.environment import World
from ibq_scale.errors import UserError
from ibq_scale.generate.images import check_pair, sample
from ibq_scale.models.sampling import SamplingSettings
from ibq_scale.pictures import to_uint8
from ibq_scale.pretrained.loading import Tokenizer, load_ar, load_tokenizer
from tests.conftest import tiny_tokenizer_sizes
from tests.ranks import run_ranks

SETTINGS = SamplingSettings(guidance=2.0, top_k=32, seed=7)


def _sample(rank: int, world_size: int, ar: str, tokenizer: str, to: str, batch: int) -> None:
    world = World(rank, world_size, rank, torch.device("cpu"))
    sample(load_ar(ar), load_tokenizer(tokenizer), [2, 0], 3, SETTINGS, Path(to), world, batch=batch)


@pytest.mark.distributed
def test_the_same_images_on_any_ranks_and_batches(tokenizer_dir: Path, ar_dir: Path, tmp_path: Path) -> None:
    run_ranks(_sample, 1, str(ar_dir), str(tokenizer_dir), str(tmp_path / "one"), 4)
    run_ranks(_sample, 2, str(ar_dir), str(tokenizer_dir), str(tmp_path / "two"), 2)
    one, two = (np.load(tmp_path / name / "samples.npz") for name in ("one", "two"))
    assert one["arr_0"].shape == (6, 32, 32, 3)
    assert one["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(one["arr_1"], [2, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(one["arr_0"], two["arr_0"])
    ar, tokenizer = load_ar(ar_dir), load_tokenizer(tokenizer_dir)
    codes = ar.generate(torch.tensor([0]), guidance=2.0, top_k=32, seed=7, ids=torch.tensor([4]))
    expected = to_uint8(tokenizer.decode(codes.view(1, 8, 8)))[0].permute(1, 2, 0)
    assert np.abs(one["arr_0"][4].astype(int) - expected.numpy().astype(int)).max() <= 1
    assert Image.open(tmp_path / "one/grid.png").size == (3 * 32 + 2 * 2, 2 * 32 + 2)
    facts = json.loads((tmp_path / "one/samples.json").read_text())
    assert (facts["classes"], facts["settings"]["guidance"]) == ([2, 0], 2.0)
    assert not list((tmp_path / "two").glob(".part*"))


def test_another_tokenizer_is_refused(ar_dir: Path) -> None:
    other = Tokenizer(*tiny_tokenizer_sizes())
    with pytest.raises(UserError, match="give the checkpoint that wrote its codes"):
        check_pair(load_ar(ar_dir), other)


def test_lists_of_classes() -> None:
    assert parse_classes("0,7,20-22") == [0, 7, 20, 21, 22]
    for wrong in ("", "a", "1-", "-3", "1;2"):
        with pytest.raises(UserError, match="write labels like"):
            parse_classes(wrong)
