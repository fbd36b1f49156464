"""Training on from a model: a run's first state is that model, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ibq_scale.checkpoint.files import write_all
from ibq_scale.config.layers import resolve
from ibq_scale.config.models import QuantizerConfig
from ibq_scale.data.folder import LocalStore
from ibq_scale.data.manifest import CodesInfo, Manifest, ShardInfo
from ibq_scale.data.sets import DataSet, DataSets
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.pretrained.loading import codebook_to_start_from, load_ar, load_tokenizer
from tests.conftest import tiny_tokenizer_sizes
from tests.ranks import run_ranks


def _tokenizer_run(path: Path, *overrides: str) -> Any:
    model, quantizer = tiny_tokenizer_sizes()
    sizes = [f"model.{k}={list(v) if isinstance(v, tuple) else v}" for k, v in model.model_dump().items()]
    sizes += [f"quantizer.{k}={getattr(quantizer, k)}" for k in ("codebook_size", "dim")]
    words = ["data.train=none", "train.global_batch=4", "train.micro_batch=2", f"init={path}"]
    return resolve("tokenizer/tiny", [*words, *sizes, *overrides]).config


def _ar_run(path: Path) -> Any:
    config = load_ar(path).config
    sizes = [
        f"model.{k}={getattr(config, k)}" for k in ("codebook_size", "classes", "tokens", "depth", "heads", "width")
    ]
    return resolve(
        "ar/tiny", ["data.train=none", "train.global_batch=4", "train.micro_batch=2", f"init={path}", *sizes]
    ).config


def _export(rank: int, world_size: int, tokenizer: Path, ar: Path, to: Path) -> None:
    from ibq_scale.train.ar_task import ARTask
    from ibq_scale.train.tokenizer_task import TokenizerTask

    world = World(rank, world_size, rank, torch.device("cpu"))
    run = _tokenizer_run(tokenizer)
    write_all(TokenizerTask(run, world, DataSets((), run.data)).state(), to / "tokenizer")
    run = _ar_run(ar)
    size = run.model.codebook_size
    codes = CodesInfo(codebook_size=size, grid=(8, 8), tokenizer=str(load_ar(ar).tokenizer_hash), source="s")
    shard = ShardInfo(name="s", samples=1, bytes=1, sha256="0" * 64)
    manifest = Manifest(kind="codes", shards=(shard,), classes=("a",), codes=codes)
    sets = DataSets((DataSet(manifest, LocalStore(to)),), run.data)
    write_all(ARTask(run, world, sets).state(), to / "ar")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_starts_as_the_model_it_is_given(tokenizer_dir: Path, ar_dir: Path, tmp_path: Path) -> None:
    run_ranks(_export, 2, tokenizer_dir, ar_dir, tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer").hash == load_tokenizer(tokenizer_dir).hash
    before, after = load_ar(ar_dir).state_dict(), load_ar(tmp_path / "ar").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_codebook_is_refused(tokenizer_dir: Path) -> None:
    _, quantizer = tiny_tokenizer_sizes()
    assert codebook_to_start_from(str(tokenizer_dir), quantizer).shape == (quantizer.codebook_size, quantizer.dim)
    with pytest.raises(UserError, match=r"has quantizer\.codebook_size=64, this run 128"):
        codebook_to_start_from(str(tokenizer_dir), quantizer.model_copy(update={"codebook_size": 128}))
    with pytest.raises(UserError, match=r"has quantizer\.kind=ibq, this run vq"):
        codebook_to_start_from(str(tokenizer_dir), QuantizerConfig(kind="vq", codebook_size=64, dim=quantizer.dim))
