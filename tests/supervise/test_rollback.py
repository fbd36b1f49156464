"""`checkpoint rollback`: a run goes on from an earlier checkpoint, and nothing of the later ones is lost or fetched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ibq_scale.checkpoint.reading import newest_or_this, whole_checkpoints
from ibq_scale.cli.main import main
from ibq_scale.supervise.run_lock import RunLock
from tests.nursery import run as run_command
from tests.train.runs import lines, words

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def _steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in whole_checkpoints(run / "checkpoints")]


def test_a_run_goes_on_from_an_earlier_checkpoint(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    more = ("train.micro_batch=8", "data.workers=0", "train.checkpoint_every=2", "train.keep_checkpoints=3")
    command = [*words(dataset, run, "train.steps=6", *more, f"train.mirror={mirror}"), "--ranks", "1"]
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    whole = lines(run)
    assert _steps(run) == [2, 4, 6]

    assert main(["checkpoint", "rollback", str(run), "--to", "3"]) == 2
    assert "no whole checkpoint of step 3. It has: 2, 4, 6" in capsys.readouterr().err
    lock = RunLock(run)
    assert main(["checkpoint", "rollback", str(run), "--to", "2"]) == 2
    assert "another job trains in" in capsys.readouterr().err
    lock.release()
    assert _steps(run) == [2, 4, 6]

    # A damaged later one goes too, else its name would be in the way.
    (run / "checkpoints/step-00000006/manifest.json").write_text("{")
    assert main(["checkpoint", "rollback", str(run), "--to", "2"]) == 0
    assert "goes on from step 2" in capsys.readouterr().out
    assert _steps(run) == [2]
    assert (run / "checkpoints/latest").read_text() == "step-00000002\n"
    assert [line["step"] for line in lines(run)] == [1, 2]
    (aside,) = (run / "rolled-back").iterdir()
    assert lines(aside) == whole
    assert newest_or_this(aside / "step-00000004").step == 4
    assert (aside / "step-00000006").is_dir()
    assert [copy.step for copy in whole_checkpoints(mirror)] == [2]

    lost = shutil.copytree(run, tmp_path / "kept")
    shutil.rmtree(run / "checkpoints")
    done = run_command(command)
    assert "fetching step-00000002" in done.stderr
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in whole]
    assert _steps(run) == [2, 4, 6]
    assert [copy.step for copy in whole_checkpoints(mirror)] == [2, 4, 6]

    # The step is in the mirror alone.
    shutil.rmtree(run)
    shutil.move(lost, run)
    shutil.rmtree(run / "checkpoints/step-00000002")
    assert main(["checkpoint", "rollback", str(run), "--to", "4"]) == 0
    assert "the next start fetches it" in capsys.readouterr().out
    assert "nothing to do" in run_command([*command, "train.steps=4"]).stderr
