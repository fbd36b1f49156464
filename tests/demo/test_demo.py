"""The whole path, end to end, in small: every command as a process of its own, over real HTTP to an S3 endpoint."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from ibq_scale.checkpoint.reading import newest_or_this, verify
from ibq_scale.demo.plan import Plan
from ibq_scale.demo.run import run_demo
from ibq_scale.errors import UserError

PLAN = Plan(crops=4, held_out_crops=2, tokenizer_steps=4, ar_steps=4, per_class=2)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.distributed
def test_photographs_to_samples_through_a_bucket(tmp_path: Path) -> None:
    before = dict(os.environ)
    to = tmp_path / "demo"
    facts = run_demo(to, PLAN)
    assert dict(os.environ) == before, "the endpoint's address must not outlive it"
    assert json.loads((to / "report.json").read_text()) == facts
    assert facts["world_size"] == 2
    assert facts["images"] == 40
    assert facts["held_out_images"] == 20
    assert 0 < facts["usage_vq"] <= 1
    assert 0 < facts["usage_ibq"] <= 1
    assert 3 < facts["psnr"] < 60
    assert facts["ar_loss_start"] == pytest.approx(math.log(1024), rel=0.05)
    assert facts["seconds_total"] == pytest.approx(sum(facts["seconds"].values()), abs=0.5)
    assert len(facts["seconds"]) == 10
    rows = sorted(p.name for p in (newest_or_this(to / "ibq").path / "codebook").iterdir())
    assert len(rows) == 2, "each rank has written its own half of the codebook"
    for run in ("ibq", "vq", "ar"):
        assert verify(newest_or_this(to / run)) == []
    with np.load(to / "samples/samples.npz") as samples:
        assert samples["arr_0"].shape == (20, 32, 32, 3)
    page = (to / "report.html").read_text()
    for title in ("Codebook usage", "Originals and reconstructions", "Samples by class", "Seconds a stage"):
        assert title in page
    for stage in facts["seconds"]:
        assert stage in page


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        run_demo(tmp_path, PLAN)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
