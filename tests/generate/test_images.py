"""Sampled images: the same ones on any number of ranks, in the layout that evaluators read."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ibq_scale.cli.sample import parse_classes
from ibq_scale.config.layers import resolve
from ibq_scale.distributed.environment import join
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.generate.chunks import Chunks, Job
from ibq_scale.generate.images import check_pair, sample
from ibq_scale.generate.published import published_sampling
from ibq_scale.models.sampling import SamplingSettings
from ibq_scale.pictures import to_uint8
from ibq_scale.pretrained.loading import load_ar, load_tokenizer
from ibq_scale.pretrained.models import Tokenizer
from tests.conftest import tiny_tokenizer_sizes
from tests.nursery import nursery
from tests.ranks import run_ranks

SETTINGS = SamplingSettings(guidance=2.0, top_k=32, seed=7)


def _sample(rank: int, world_size: int, ar: str, tokenizer: str, to: str, options: dict[str, Any]) -> dict[str, Any]:
    world = World(rank, world_size, rank, torch.device("cpu"))
    where = (Path(to), world)
    return asdict(sample(load_ar(ar), load_tokenizer(tokenizer), [2, 0], 3, SETTINGS, *where, **{"batch": 4} | options))


def _several(rank: int, world_size: int, ar: str, tokenizer: str, jobs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Jobs one after the other, in the same processes."""
    return [_sample(rank, world_size, ar, tokenizer, to, options) for to, options in jobs]


@pytest.fixture(scope="module")
def whole(tokenizer_dir: Path, ar_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job by one rank."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(_sample, 1, str(ar_dir), str(tokenizer_dir), str(folder), {})
    return folder


def test_images_are_functions_of_seed_class_and_place(whole: Path, tokenizer_dir: Path, ar_dir: Path) -> None:
    with np.load(whole / "samples.npz") as content:
        images, labels = content["arr_0"], content["arr_1"]
    assert (images.shape, images.dtype) == ((6, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(labels, [2, 2, 2, 0, 0, 0])
    ar, tokenizer = load_ar(ar_dir), load_tokenizer(tokenizer_dir)
    codes = ar.generate(torch.tensor([0]), guidance=2.0, top_k=32, seed=7, ids=torch.tensor([1]))
    expected = to_uint8(tokenizer.decode(codes.view(1, 8, 8)))[0].permute(1, 2, 0)
    assert np.abs(images[4].astype(int) - expected.numpy().astype(int)).max() <= 1
    grid = np.asarray(Image.open(whole / "grid.png"))
    assert grid.shape == (2 * 32 + 2, 3 * 32 + 2 * 2, 3)
    np.testing.assert_array_equal(grid[-32:, -32:], images[5])
    facts = json.loads((whole / "samples.json").read_text())
    assert (facts["classes"], facts["settings"]["guidance"], facts["images"]) == ([2, 0], 2.0, 6)
    assert sorted(path.name for path in whole.iterdir()) == ["grid.png", "samples.json", "samples.npz"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_any_ranks_write_the_same_bytes(
    ranks: int, whole: Path, tokenizer_dir: Path, ar_dir: Path, tmp_path: Path
) -> None:
    run_ranks(_sample, ranks, str(ar_dir), str(tokenizer_dir), str(tmp_path), {})
    for name in ("samples.npz", "grid.png"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.distributed
def test_parts_of_an_array_and_a_batch_of_another_size(
    whole: Path, tokenizer_dir: Path, ar_dir: Path, tmp_path: Path
) -> None:
    parts, other = str(tmp_path / "parts"), str(tmp_path / "other")
    jobs: list[tuple[str, dict[str, Any]]] = [(parts, {"part": (i, 2)}) for i in (1, 0, 0)]
    reports = run_ranks(_several, 1, str(ar_dir), str(tokenizer_dir), [*jobs, (other, {"batch": 5})])[0]
    seen = [(r["complete"], r["images"], r["reused_images"]) for r in reports]
    assert seen == [(False, 2, 0), (True, 4, 0), (True, 4, 4), (True, 6, 0)]
    assert (tmp_path / "parts/samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()
    with np.load(whole / "samples.npz") as one, np.load(tmp_path / "other/samples.npz") as two:
        np.testing.assert_array_equal(one["arr_0"], two["arr_0"])


def _killed(ar: str, tokenizer: str, to: str) -> None:
    """Ends this process, as a kill does, when the first of two chunks is written."""
    torch.set_num_threads(1)
    written = Chunks.write

    def write(self: Chunks, number: int, images: Any) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        written(self, number, images)

    Chunks.write = write  # type: ignore[method-assign]
    with join() as world:
        sample(load_ar(ar), load_tokenizer(tokenizer), [2, 0], 3, SETTINGS, Path(to), world, batch=4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_job_goes_on_to_the_same_bytes(
    damaged: bool, whole: Path, tokenizer_dir: Path, ar_dir: Path, tmp_path: Path
) -> None:
    words = (str(ar_dir), str(tokenizer_dir), str(tmp_path))
    process = nursery().start(partial(_killed, *words), os.environ)
    assert process.wait() == -signal.SIGKILL
    chunk = tmp_path / ".parts/000000.npz"
    content = bytearray(chunk.read_bytes())
    assert not (tmp_path / "samples.npz").exists()
    if damaged:
        content[len(content) // 2] ^= 1
        chunk.write_bytes(content)
    again = run_ranks(_sample, 2, *words, {})[0]
    assert (again["complete"], again["reused_images"]) == (True, 0 if damaged else 4)
    assert (tmp_path / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()


def test_chunks_of_another_job_are_none_of_this_one(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    job, other = (Job((0, 0), 2, 2, 4, {"seed": seed}) for seed in (0, 1))
    Chunks(tmp_path, job).write(0, images)
    assert Chunks(tmp_path, other).read(0) is None
    assert Chunks(tmp_path, job).read(0) is not None


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 40))
def test_chunks_hold_every_image_once(classes: int, per_class: int, batch: int) -> None:
    labels = tuple(c for c in range(classes) for _ in range(per_class))
    job = Job(labels, per_class, batch, 8, {})
    seen = []
    for number in range(job.chunks):
        rows = list(zip(*job.rows(number), strict=True))
        assert len(rows) == batch
        seen += rows[: job.size(number)]
    assert sorted(seen) == [(c, i) for c in range(classes) for i in range(per_class)]


def test_published_settings_are_those_of_the_presets_sizes() -> None:
    sizes = {name: resolve(f"ar/{name}").config.model for name in ("b", "l", "xl", "xxl", "llamagen-b")}
    found = [published_sampling(sizes[name]) for name in ("b", "l", "xl", "xxl")]
    assert found == [(2.25, 1.1), (2.0, 1.0), (2.35, 1.15), (2.85, 1.2)]
    with pytest.raises(UserError, match="give --guidance and --temperature"):
        published_sampling(sizes["llamagen-b"])


def test_another_tokenizer_is_refused(ar_dir: Path) -> None:
    other = Tokenizer(*tiny_tokenizer_sizes())
    with pytest.raises(UserError, match="give the checkpoint that wrote its codes"):
        check_pair(load_ar(ar_dir), other)


def test_lists_of_classes() -> None:
    assert parse_classes("0,7,20-22") == [0, 7, 20, 21, 22]
    for wrong in ("", "a", "1-", "-3", "1;2"):
        with pytest.raises(UserError, match="write labels like"):
            parse_classes(wrong)
