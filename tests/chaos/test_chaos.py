"""A few random kills of each stage; `make chaos` does fifty of each by the same code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ibq_scale.checkpoint.reading import whole_checkpoints
from tests.chaos.campaign import Campaign
from tests.chaos.disk import Inspector, difference
from tests.chaos.scenario import SCENARIOS

# Seeds that aim at different instants and victims: a data worker within a step and the launcher within a save; one rank
# within a step and all of them between a checkpoint's rename and its pointer.
SEEDS = {"tokenizer": 36, "ar": 55}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("task", list(SCENARIOS))
def test_killed_runs_end_in_the_bits_of_the_unkilled_one(task: str, tmp_path: Path) -> None:
    result = Campaign(SCENARIOS[task], tmp_path / task, kills=2, seed=SEEDS[task], tell=print).run()
    assert not result.faults, "\n".join(result.summary())
    assert len(result.kills) == 2
    assert result.tensors > 100
    _violations_are_seen(tmp_path / task / "reference", tmp_path / task / "run-1")


def _violations_are_seen(reference: Path, run: Path) -> None:
    """What calls the run faultless would see one bit, one step, one sample."""
    inspector = Inspector(run)
    assert inspector.look() == []
    older, newest = (checkpoint.path for checkpoint in whole_checkpoints(run / "checkpoints"))

    path = min(newest.rglob("rank-00001.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    [fault] = difference(reference, run)
    assert fault.startswith(f"{path.relative_to(newest)}: ")
    assert "content changed" in inspector.look()[0]

    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:5], *lines[4:]]))
    assert "metrics.jsonl has the steps [1, 2, 3, 4, 5, 5, 6" in difference(reference, run)[-1]

    sums = json.loads((older / "epochs.json").read_text())
    assert sums["begun"], "the older checkpoint ends with an epoch: choose other sizes"
    sums["begun"][0]["sum"] += 1
    (older / "epochs.json").write_text(json.dumps(sums) + "\n")
    assert any("the samples seen are" in fault for fault in inspector.look())

    shutil.rmtree(newest)
    told = "; ".join(inspector.look())
    assert "the newest whole checkpoint is of step 22, and there was one of step 24" in told
    assert "latest names 'step-00000024', the whole ones are ['step-00000022']" in told
