"""Ranks that add up, and those that do not come."""

from __future__ import annotations

import json
import os

import pytest

from ibq_scale.doctor import ranks
from ibq_scale.doctor.tools import Subject
from ibq_scale.findings import Finding


def _told(monkeypatch: pytest.MonkeyPatch, code: int, said: str, subject: Subject | None = None) -> Finding:
    monkeypatch.setattr(ranks, "ask", lambda *words, seconds: (code, said))
    (line,) = ranks.all_reduce(subject or Subject(ranks=2))
    return line


REPORT = {"ranks": 2, "backend": "nccl", "bus_bytes_per_s": 3e11, "latency_s": 2e-5, "right": True}


def test_what_the_ranks_say(monkeypatch: pytest.MonkeyPatch) -> None:
    line = _told(monkeypatch, 0, f"a warning\n{json.dumps(REPORT)}")
    assert line == Finding("ok", "all-reduce", "2 ranks, nccl: 300.00 GB/s, 0.02 ms")
    assert _told(monkeypatch, 0, json.dumps(REPORT | {"bus_bytes_per_s": 1e9})).level == "warn"
    line = _told(monkeypatch, 1, json.dumps(REPORT | {"right": False}))
    assert (line.level, line.text) == ("FAIL", "2 ranks, nccl: 300.00 GB/s, 0.02 ms; the sums are WRONG")
    line = _told(monkeypatch, 1, "Traceback\nibq-scale: rank 1: DistBackendError: NCCL error: Duplicate GPU\nnoise")
    assert line.text == "2 ranks: rank 1: DistBackendError: NCCL error: Duplicate GPU"
    assert _told(monkeypatch, 124, "no answer within 60 s").text == "2 ranks did not meet within 60 s"


@pytest.mark.slow
@pytest.mark.distributed
def test_real_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = ranks.all_reduce(Subject(ranks=2))
    assert line.level == "ok", line
    assert line.text.startswith("2 ranks, ")


@pytest.mark.slow
def test_ranks_that_do_not_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SECONDS", 1.0)
    (line,) = ranks.all_reduce(Subject(ranks=2))
    assert line.text == "2 ranks did not meet within 1 s"
    assert "RANK" not in os.environ
