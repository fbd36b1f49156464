"""The point of the method, on photographs: IBQ's codebook fills, plain VQ's collapses (arXiv 2412.02692)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import nursery

STEPS = 60


def _ibq_scale(*words: str) -> str:
    done = nursery.run(words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.distributed
def test_ibq_uses_the_codebook_that_vq_does_not(imagenet_mini_dir: Path, tmp_path: Path) -> None:
    """Bounds of issue 2 (85 % and 10 % of 1,024 codes within 300 steps), here after a fifth of them."""
    data = str(tmp_path / "data")
    _ibq_scale("prepare", "images", str(imagenet_mini_dir), "--to", data, "--size", "96")
    usage = {}
    for kind in ("ibq", "vq"):
        words = [f"data.train={data}", f"out={tmp_path / kind}", f"train.steps={STEPS}", f"quantizer.kind={kind}"]
        _ibq_scale("train", "tokenizer", "tiny", *words, "--ranks", "2")
        words = ["evaluate", "reconstruction", str(tmp_path / kind), data, "--limit", "400", "--ranks", "2", "--json"]
        usage[kind] = json.loads(_ibq_scale(*words))["usage"]
    assert usage["ibq"] >= 0.85, usage
    assert usage["vq"] < 0.10, usage
