"""metrics.jsonl holds each step once, also over resumes and crashes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ibq_scale.config.layers import resolve
from ibq_scale.console import duration
from ibq_scale.supervise.dashboards import Histogram
from ibq_scale.supervise.metrics import MetricsLog, keep_until

VALUES = {"loss": 1.0, "samples_per_s": 10.0, "step_s": 0.5, "data_wait": 0.01, "memory_bytes": 2.04e9}


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolve("tokenizer/tiny", ["data.train=x", "train.steps=100"]).config
    log = MetricsLog(tmp_path, config, 0)
    for step in (10, 20, 30):
        log.write(step, 16 * step, VALUES, ("loss",))
    log.close()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "step  10/100  loss 1  10.0 img/s  wait 1 %  mem 2.04 GB  ETA 45s"
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 40, "los')
    log = MetricsLog(tmp_path, config, 20)
    assert _steps(tmp_path) == [10, 20]
    log.write(30, 480, VALUES, ("loss",))
    log.close()
    assert _steps(tmp_path) == [10, 20, 30]
    times = [json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times), "a resumed run's clock goes on"


def test_utilization_and_skipped_steps_are_shown_where_there_are_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path, resolve("tokenizer/tiny", ["data.train=x", "train.steps=100"]).config, 0)
    log.write(10, 160, VALUES | {"mfu": 0.4123, "skipped": 2.0}, ("loss",))
    log.close()
    said = capsys.readouterr().err
    assert "10.0 img/s  MFU 41.2 %  wait 1 %" in said
    assert said.endswith("ETA 45s  skipped 2\n")


def test_a_long_stand_for_a_save_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, resolve("tokenizer/tiny", ["data.train=x", "train.steps=100"]).config, 0)
    log.write(10, 160, VALUES | {"save_stall_s": 0.4}, ("loss",))
    log.write(20, 320, VALUES | {"save_stall_s": 12.34}, ("loss",))
    log.close()
    short, long = capsys.readouterr().err.splitlines()
    assert short.endswith("ETA 45s")
    assert long.endswith("ETA 40s  stood still 12.3 s for a save")


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricsLog(tmp_path, resolve("tokenizer/tiny", ["data.train=x", "train.steps=100"]).config, 0)
    log.write(10, 160, VALUES, ("loss",))
    log.close()
    assert caplog.text.count("No space left on device") == 2
    (tmp_path / "images").symlink_to("/dev/full")
    log.show(10, {"samples": torch.zeros(3, 5, 7, dtype=torch.uint8)})
    assert "could not write" in caplog.text
    assert "samples-00000010.png" in caplog.text


def test_alarms_and_histograms_stand_in_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, resolve("tokenizer/tiny", ["data.train=x", "train.steps=100"]).config, 0)
    log.write(10, 160, VALUES, ("loss",), ["usage fell"], {"code_choices": Histogram([5, 2], [0, 1, 2])})
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["alarms"] == ["usage fell"]
    assert line["histograms"] == {"code_choices": {"counts": [5, 2], "edges": [0, 1, 2]}}
    assert "ALARM at step 10: usage fell" in capsys.readouterr().err


def test_durations() -> None:
    assert [duration(s) for s in (8, 750, 11_100)] == ["8s", "12m30s", "3h05m"]


@pytest.mark.parametrize(
    "damage", ['{"st\x00ep": 2', "[1]", "5", '{"samples": 8}', '{"step": "2", "time": 1}', "[" * 100_000]
)
def test_a_damaged_line_is_left_out_and_the_run_goes_on(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "samples": step, "time": float(step)}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join([good[0], damage, *good[1:]]) + "\n")
    assert keep_until(path, 3) == 3.0
    assert path.read_text().splitlines() == good[:3]
