"""A check that crashes, hangs or dies is one line, and harms no other."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ibq_scale.doctor import run
from ibq_scale.doctor.run import Check, examine
from ibq_scale.doctor.tools import Subject
from ibq_scale.findings import Finding


def _check(name: str, seconds: float = 30.0, **how: object) -> Check:
    return Check(name, f"tests.doctor.patients:{name}", seconds, **how)  # type: ignore[arg-type]


def _written(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def test_lines_come_in_order_whatever_a_check_does() -> None:
    checks = [_check("well"), _check("crashes", alone=True), _check("misused"), _check("dies"), _check("absent")]
    found = list(examine(Subject(data="x"), checks))
    assert found[:2] == [Finding("ok", "well", "data x"), Finding("warn", "second", "seen", "do it")]
    assert [line.level for line in found[2:]] == ["FAIL"] * 4
    assert [line.name for line in found[2:]] == ["crashes", "misused", "dies", "absent"]
    assert "KeyError: 'unforeseen'" in found[2].text
    assert found[3].text == "the bucket does not exist: make it"
    assert "SIGSEGV" in found[4].text
    assert "absent" in found[5].text


@pytest.mark.slow
def test_one_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes when the check hangs: a slow start of the processes counts for nothing."""
    pid = tmp_path / "pid"
    hung_for = 3600.0
    clock = SimpleNamespace(sleep=time.sleep, monotonic=lambda: hung_for if _written(pid) else 0.0)
    monkeypatch.setattr(run, "time", clock)
    hung, well = examine(Subject(run_dir=str(pid)), [_check("hangs", 2.0), _check("rank", 2 * hung_for)])
    assert (hung.level, hung.name, hung.text) == ("FAIL", "hangs", "no answer within 2 s")
    assert well.level == "ok"
    status = Path(f"/proc/{pid.read_text()}/status")
    deadline = time.monotonic() + 60.0
    while status.exists() and "Z (zombie)" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_check_is_no_rank_of_the_job_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert list(examine(Subject(), [_check("rank")])) == [Finding("ok", "rank", "none")]


def test_what_needs_data_is_left_out_without() -> None:
    assert list(examine(Subject(), [_check("well", needs="data")])) == []
