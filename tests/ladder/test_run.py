"""One command from a file to a report; run again it goes on, and never under another config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from ibq_scale.cli.main import main
from ibq_scale.errors import UserError
from ibq_scale.ladder import run as run_module
from ibq_scale.ladder.results import collect, load
from ibq_scale.ladder.run import is_finished, run_ladder
from ibq_scale.ladder.rungs import rungs_of
from ibq_scale.ladder.schema import load_ladder
from tests.cluster.fake_slurm import install
from tests.samples import write_codes

SIZES = [{"name": name, "depth": 1, "heads": 1, "width": width} for name, width in (("a", 8), ("b", 16), ("c", 32))]
OVERRIDES = ["model.tokens=16", "model.classes=3", "train.global_batch=4", "train.micro_batch=4", "train.log_every=1"]


def _file(tmp_path: Path, sizes: list[dict[str, object]], samples: list[int]) -> str:
    for name, seed in (("train", 0), ("held", 1)):
        if not (tmp_path / name).exists():
            (tmp_path / name).mkdir()
            write_codes(tmp_path / name, seed)
    values = {
        "name": "small",
        "preset": "ar/tiny",
        "overrides": [*OVERRIDES, "schedule.warmup_samples=0"],
        "sizes": sizes,
        "budget": {"samples": samples},
        "codes": {"train": str(tmp_path / "train"), "validation": str(tmp_path / "held"), "codebooks": [40]},
        "machine": {"ranks": 1},
        "out": str(tmp_path / "ladder"),
    }
    (tmp_path / "ladder.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "ladder.yaml")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.distributed
def test_one_command_trains_collects_fits_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _file(tmp_path, SIZES, [4, 8, 12])
    assert main(["scale", "run", file, "--json", "--replicas", "20"]) == 0
    said = json.loads(capsys.readouterr().out)
    (fit,) = said["fits"]
    assert said["missing"] == []
    assert "L(N, D), K = 40" in fit["laws"]
    results = load(tmp_path / "ladder/results.json")
    assert len(results) == 9
    assert all(result.held_out and 3 < result.loss < 4.5 for result in results)
    assert {result.epochs for result in results} == {4 / 60, 8 / 60, 12 / 60}
    page = (tmp_path / "ladder/report.html").read_text()
    assert all(result.name in page for result in results)

    ladder = load_ladder(file)
    first, *_, last = rungs_of(ladder)
    times = {rung.name: (rung.folder / "metrics.jsonl").stat().st_mtime_ns for rung in rungs_of(ladder)}
    shutil.rmtree(last.folder / "checkpoints")
    assert not is_finished(last)
    assert [r.name for r in collect(rungs_of(ladder))[0]] == [r.name for r in rungs_of(ladder)[:-1]]
    assert run_ladder(ladder) == 0, "what is missing is trained, and nothing else"
    again = {rung.name: (rung.folder / "metrics.jsonl").stat().st_mtime_ns for rung in rungs_of(ladder)}
    assert {name for name in times if times[name] != again[name]} == {last.name}

    _file(tmp_path, SIZES[:1], [4])
    other = load_ladder(file, ["rate.lr=0.5"])
    with pytest.raises(UserError, match="is a run of another config"):
        run_ladder(other)
    assert first.folder.is_dir()


def test_a_rung_that_fails_ends_the_series_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def stopped(words: list[str], ranks: int | None) -> int:
        asked.append(words)
        return 75

    monkeypatch.setattr(run_module, "launch", stopped)
    assert main(["scale", "run", _file(tmp_path, SIZES, [4, 8])]) == 75
    assert len(asked) == 1
    assert asked[0][:3] == ["train", "ar", "ar/tiny"]
    assert asked[0][-2:] == ["--ranks", "1"]
    assert "[1/6]" in capsys.readouterr().err
    assert not (tmp_path / "ladder/report.html").exists()


def test_nothing_finished_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _file(tmp_path, SIZES, [4])
    assert main(["scale", "collect", file]) == 2
    assert "no rung is finished" in capsys.readouterr().err
    assert main(["scale", "fit", file]) == 2
    assert "scale collect" in capsys.readouterr().err


@pytest.mark.slow
def test_pictures_that_are_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scale", "run", "cpu", f"out={tmp_path}", f"tiles.pictures={tmp_path / 'none'}"]
    assert main(words) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_rungs_become_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slurm").mkdir()
    slurm = install(tmp_path / "slurm", monkeypatch)
    words = ["scale", "submit", _file(tmp_path, SIZES[:2], [8]), "--nodes", "1", "--gpus-per-node", "0"]
    words += ["--time", "01:00:00"]
    assert main([*words, "--dry-run"]) == 0
    assert slurm.calls == []
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr().out
    rows = json.loads(said[said.index("[") :])
    assert [row["jobs"] for row in rows] == [["101"], ["102"]]
    for row, call in zip(rows, slurm.calls, strict=True):
        assert call.startswith("sbatch --parsable ")
        assert call.endswith(f"out={row['run']}")
        assert (Path(row["run"]) / "submitted/001/config.yaml").is_file()
    assert main([*words, "--json", "codes.train=no-such-folder"]) == 2
    assert "not submitted" in capsys.readouterr().err
