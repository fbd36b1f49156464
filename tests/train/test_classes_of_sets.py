"""Two sets of codes are joined and validated by their classes' names, and never by numbers that happen to match."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ibq_scale.config.layers import resolve
from ibq_scale.config.run import ARRun
from ibq_scale.data.codes import CodeShard, finish_codes, write_code_shard
from ibq_scale.data.manifest import CodesInfo
from ibq_scale.data.sets import open_sets
from ibq_scale.data.store import open_store
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.supervise.compatible import check_codes
from ibq_scale.train.validation import HeldOutCodes

TRAINED = ("ant", "bee", "dog")


def _codes(folder: Path, classes: tuple[str, ...], seed: int) -> str:
    info = CodesInfo(codebook_size=64, grid=(4, 4), tokenizer="t" * 64, source=str(seed) * 64)
    store = open_store(str(folder))
    codes = np.zeros((len(classes), 1, 4, 4), np.int64)
    shard = write_code_shard(store, "codes-000000.safetensors", CodeShard(codes, np.arange(len(classes))), info)
    finish_codes(store, [shard], classes, info)
    return str(folder)


def _run(*overrides: str) -> ARRun:
    run = resolve("ar/tiny", ["model.codebook_size=64", "model.tokens=16", *overrides]).config
    assert isinstance(run, ARRun)
    return run


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        (TRAINED, ""),
        (TRAINED[:2], ""),
        (("ant", "bee", "cat", "dog"), "number 2 is 'cat' there and 'dog' here"),
        (("bee", "ant", "dog"), "number 0 is 'bee' there and 'ant' here"),
        ((*TRAINED, "elk"), "number 3 is 'elk' there and none here"),
        (("unlabelled",), "number 0 is 'unlabelled' there and 'ant' here"),
        (("0", "1", "2"), "number 0 is '0' there"),
    ],
)
def test_held_out_codes_of_other_classes_are_refused(tmp_path: Path, held_out: tuple[str, ...], said: str) -> None:
    trained = _codes(tmp_path / "train", TRAINED, 1)
    other = _codes(tmp_path / "val", held_out, 2)
    run = _run(f"data.train={trained}", f"validation.data={other}")
    world = World(0, 1, 0, torch.device("cpu"))
    if not said:
        HeldOutCodes(run, world, open_sets(run.data, "codes"))
        return
    with pytest.raises(UserError, match=f"{said}.*--classes {trained}"):
        HeldOutCodes(run, world, open_sets(run.data, "codes"))
    joined = _run(f"data.train=[{trained},{other}]")
    if held_out[:3] == TRAINED:
        check_codes(joined, open_sets(joined.data, "codes"))
        return
    with pytest.raises(UserError, match="has other classes"):
        check_codes(joined, open_sets(joined.data, "codes"))
