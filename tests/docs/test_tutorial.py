"""The tutorial's part for two CPU cores, run as it stands, with fewer steps; and the blocks of Python beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.docs.pages import ROOT, blocks, commands
from tests.samples import write_pictures

STEPS = 4


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.distributed
def test_from_a_folder_of_pictures_to_samples(tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos")
    page = tmp_path / "page.md"
    text = (ROOT / "docs/tutorial.md").read_text()
    page.write_text(text[text.index("## On two CPU cores") : text.index("## On one GPU")])
    done = [words[0] for words in commands(page)]
    assert done == ["prepare", "data", "train", "evaluate", "tokenize", "train", "sample", "report", "checkpoint"]
    for words in commands(page):
        _run([word.replace("train.steps=300", f"train.steps={STEPS}") for word in words], tmp_path)
    for name in ("sheet.png", "runs/tok/evaluation/worst.png", "samples/grid.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 1000, name
    with np.load(tmp_path / "samples/samples.npz") as samples:
        assert samples["arr_0"].shape == (12, 64, 64, 3)
    _metrics(tmp_path)
    _python_blocks(tmp_path)


def _run(words: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "ibq_scale", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def _metrics(folder: Path) -> None:
    """Every name in the runs' metrics is explained."""
    page = (ROOT / "docs/metrics.md").read_text()
    for log in folder.glob("runs/*/metrics.jsonl"):
        names = {name for line in log.read_text().splitlines() for name in json.loads(line)}
        assert {name for name in names if f"`{name}`" not in page} == set(), log


def _python_blocks(folder: Path) -> None:
    """The pages on formats read what the tutorial wrote, and what they read is what the package loads."""
    (data,) = blocks(ROOT / "docs/data-format.md", "python")
    (weights,) = blocks(ROOT / "docs/checkpoint-format.md", "python")
    assert weights.count("step-00000300") == 1
    weights = weights.replace("step-00000300", f"step-{STEPS:08d}")
    check = (
        "import torch, ibq_scale\n"
        "theirs = ibq_scale.load_tokenizer('models/tok').autoencoder.state_dict()\n"
        "ours = {n.removeprefix('autoencoder.'): w for n, w in weights.items() if n.startswith('autoencoder.')}\n"
        "assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()\n"
        "assert all(torch.equal(ours[n], theirs[n]) for n in ours)\n"
    )
    for program in (data, weights + check):
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
