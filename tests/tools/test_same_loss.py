"""The tool that shows a change of the code to have changed nothing, or what."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.tools.same_loss import ROOT, CannotTrainError, Outcome, checkout, differences, main, train, write_data


def test_equal_outcomes_have_no_differences_and_others_are_named() -> None:
    old = Outcome([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], {"a": torch.ones(3), "b": torch.ones(2)})
    assert differences(old, Outcome([dict(line) for line in old.lines], dict(old.tensors))) == []
    last = torch.nextafter(torch.ones(3), torch.zeros(3))
    new = Outcome([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}], {"a": last, "c": torch.ones(2)})
    assert differences(old, new) == [
        "loss: 1.0 before, 1.5 now, from step 2 on",
        "a: differs by up to 5.96e-08",
        "b: only before",
        "c: only now",
    ]
    assert differences(old, Outcome(old.lines[:1], old.tensors)) == ["2 steps were logged before, 1 now"]
    other = Outcome(old.lines, old.tensors | {"a": torch.ones(3).double()})
    assert differences(old, other) == ["a: (3,) torch.float32 before, (3,) torch.float64 now"]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_changed_number_in_the_code_is_found(tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    for name in ("ibq_scale", "deepspeed_configs"):
        shutil.copytree(ROOT / name, changed / name, ignore=shutil.ignore_patterns("__pycache__"))
    config = changed / "ibq_scale/config/run.py"
    text = config.read_text()
    weight = "    entropy_weight: NonNegativeFloat = Field(0.05,"
    assert text.count(weight) == 1
    config.write_text(text.replace(weight, weight.replace("0.05", "0.06")))
    data = write_data(tmp_path / "data")["tokenizer"]
    outcomes = [train(source, "tokenizer", data, tmp_path / source.name, 2) for source in (ROOT, changed)]
    said = differences(*outcomes)
    assert any(line.startswith("loss: ") and line.endswith("from step 1 on") for line in said)
    assert any(line.startswith("encoder.") for line in said)


def test_what_cannot_be_compared_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if subprocess.run(["git", "-C", ROOT, "rev-parse"], capture_output=True, check=False).returncode:
        pytest.skip("this is no git checkout")
    assert main(["no-such-revision"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "ibq_scale").mkdir()
    (tmp_path / "ibq_scale/__init__.py").touch()
    with pytest.raises(CannotTrainError, match="'ibq-scale train ar tiny …' in"):
        train(tmp_path, "ar", tmp_path, tmp_path / "out", 1)
    with checkout(None) as folder:
        assert folder == ROOT
