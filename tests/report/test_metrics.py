"""Logs as columns: every whole line counts, no damaged one does, and curves keep what stands out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibq_scale.errors import UserError
from ibq_scale.report.compare import write_report
from ibq_scale.report.metrics import read_metrics
from ibq_scale.report.page import MOST_POINTS, Point, extremes, thin
from ibq_scale.report.runs import load_run


def _line(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "samples": 8 * step, "time": 0.5 * step, "loss": 1 / step, **more}) + "\n"


def _run(folder: Path, lines: list[str]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("task: ar\nname: x\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_lines_of_other_keys_stay_in_their_order(tmp_path: Path) -> None:
    lines = [_line(1), _line(2, usage=0.5), _line(3, alarms=["dead codes"], histograms={"a": [1]}), _line(4)]
    log = load_run(_run(tmp_path / "run", lines))
    assert log.points("loss") == [Point(s, 8 * s, 0.5 * s, 1 / s) for s in (1, 2, 3, 4)]
    assert log.points("usage") == [Point(2, 16, 1.0, 0.5)]
    assert log.metrics.alarms == [(3, "dead codes")]
    assert log.points("alarms") == log.points("histograms") == log.points("never") == []
    assert log.last("usage") == "50 %"


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"step": 2, "sam\n',
        b'{"step": 2, "samples": 16, "time": 1.0, "loss": 0.5}{"step": 3}\n',
        b"\x00" * 64 + b"\n",
        b'{"step": 2, "samples": 16, "time": 1.0, "lo\xff": }\n',
        b'{"step": 2, "samples": 16, "loss": 0.5}\n',
        b'{"step": "2", "samples": 16, "time": 1.0, "loss": 0.5}\n',
        b'{"step": 2e300, "samples": 16, "time": 1.0, "loss": 0.5, "alarms": ["lost"]}\n',
        b'{"step": NaN, "samples": 16, "time": 1.0, "loss": 0.5}\n',
        b"7\n",
        b"[" * 100_000 + b"\n",
        b"\n",
    ],
)
def test_a_damaged_line_is_left_out_and_those_after_it_are_not(damaged: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(_line(1).encode() + damaged + _line(3).encode())
    found = read_metrics(path)
    assert found.curve("loss").steps.tolist() == [1, 3]
    assert found.curve("loss").values.tolist() == [1, 1 / 3]
    assert found.alarms == []


def test_a_value_that_is_no_number_is_left_out_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(_line(1, usage="half", dead=None) + _line(2, usage=10**400) + _line(3, usage=0.25))
    found = read_metrics(path)
    assert found.curve("loss").steps.tolist() == [1, 2, 3]
    assert found.curve("usage").steps.tolist() == [3]


def test_a_report_parses_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path / "run", [_line(s, usage=0.5) for s in range(1, 41)])
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    write_report([run], tmp_path / "report.html")
    assert len(parsed) == 40


def test_a_chart_has_the_points_that_thinning_all_of_them_leaves(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=3001).tolist()
    values[1234] = 1e9
    log = load_run(_run(tmp_path / "run", [_line(s, loss=value) for s, value in enumerate(values, 1)]))
    drawn = log.series("loss", 0).points
    assert len(drawn) <= MOST_POINTS
    assert {p.value for p in drawn} >= {min(values), max(values)}
    # By the definition: the lowest and the highest of every stretch of 8.
    full, expected = log.points("loss"), []
    for first in range(0, len(full), 8):
        part = full[first : first + 8]
        expected += sorted({min(part, key=lambda p: p.value), max(part, key=lambda p: p.value)})
    assert list(drawn) == expected
    assert thin(drawn) == thin(full)


def test_what_is_no_number_hides_no_spike() -> None:
    value_R = np.ones(4000)
    value_R[[0, 1000, 2000]] = np.nan
    value_R[2001] = 50.0
    value_R[3000:3010] = np.nan
    kept = value_R[extremes(value_R)]
    assert np.nanmax(kept) == 50.0
    assert np.nanmin(kept) == 1.0


def test_a_damaged_config_is_an_error_and_a_damaged_environment_is_none(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", [_line(1)])
    (run / "environment.json").write_text('{"world_')
    assert load_run(run).environment == {}
    for text in (b"task: [\n", b"\xff\xfe\x00", b"", b"\x00\x01"):
        (run / "config.yaml").write_bytes(text)
        with pytest.raises(UserError, match="is damaged"):
            load_run(run)
