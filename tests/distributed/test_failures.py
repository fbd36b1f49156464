"""What ranks leave when they fail, and the one message that is made of it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ibq_scale.distributed.failures import (
    FOLDER,
    TORCHRUN,
    collect,
    describe,
    explain,
    leave,
    tell_alone,
    tell_of_job_step,
)
from ibq_scale.errors import UserError


class DistNetworkError(RuntimeError):
    """Of torch, by its name."""


CLOSED = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:5412"


def _fail(error: Exception) -> Exception:
    try:
        raise error
    except Exception as e:
        return e


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "failures"))
    (tmp_path / "failures").mkdir()
    monkeypatch.setenv("WORLD_SIZE", "4")
    return tmp_path / "failures"


def _leave(monkeypatch: pytest.MonkeyPatch, rank: int, error: Exception, code: int = 1) -> None:
    monkeypatch.setenv("RANK", str(rank))
    assert leave(_fail(error), code)


def test_the_first_cause_is_named_last_and_its_traceback_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its node's clock is behind those of the others."""
    _leave(monkeypatch, 0, RuntimeError(CLOSED))
    _leave(monkeypatch, 3, DistNetworkError("peer gone"))
    _leave(monkeypatch, 2, RuntimeError(CLOSED))
    _leave(monkeypatch, 1, ZeroDivisionError("no tokens"))
    found = collect(folder)
    assert [failure.rank for failure in found] == [1, 0, 3, 2]
    said = explain(found, {}).splitlines()
    assert said[0] == "Traceback (most recent call last):"
    assert "in _fail" in said[1]
    assert [line for line in said if line.startswith("ibq-scale: then")] == [
        f"ibq-scale: then ranks 0, 2: RuntimeError: {CLOSED}",
        "ibq-scale: then rank 3: DistNetworkError: peer gone",
    ]
    assert said[-1].startswith("ibq-scale: rank 1 of 4 on ")
    assert said[-1].endswith(" failed first: ZeroDivisionError: no tokens")
    assert explain(found, {}).count("Traceback") == 1


def test_a_rank_that_fails_before_it_joins_knows_of_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.setenv("SLURM_PROCID", "9")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert leave(_fail(ZeroDivisionError("no tokens")), 1)
    assert "rank 9 of 16 on " in explain(collect(folder), {})


def test_of_two_causes_the_earlier_is_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _leave(monkeypatch, 2, ValueError("early"))
    _leave(monkeypatch, 0, ValueError("late"))
    said = explain(collect(folder), {}).splitlines()
    assert said[-1].endswith("failed first: ValueError: early")
    assert said[-2] == "ibq-scale: then rank 0: ValueError: late"


def test_a_mistake_on_one_rank_is_said_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _leave(monkeypatch, 0, RuntimeError(CLOSED))
    for rank in (1, 3):
        _leave(monkeypatch, rank, UserError("s3://b has no manifest.json"), UserError.exit_code)
    found = collect(folder)
    assert explain(found, {}) == "ibq-scale: s3://b has no manifest.json"
    assert found[0].code == 2


def test_what_the_kernel_killed_is_the_cause(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _leave(monkeypatch, 0, RuntimeError(CLOSED))
    said = explain(collect(folder), {1: signal.SIGKILL}).splitlines()
    assert said[-1].startswith("ibq-scale: rank 1 killed by SIGKILL: the kernel does that when memory runs out")
    assert explain([], {0: signal.SIGSEGV, 1: signal.SIGSEGV}) == "ibq-scale: ranks 0, 1 killed by SIGSEGV"
    assert explain([], {}) == ""


def test_without_a_cause_that_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(20):
        _leave(monkeypatch, rank, RuntimeError(CLOSED))
    said = explain(collect(folder), {}).splitlines()
    assert said[0].startswith("ibq-scale: then ranks 0, 1, 2, 3, 4,")
    assert " and 4 more: RuntimeError" in said[0]
    assert "no rank tells of a first cause" in said[1]


def test_a_jobs_step_is_told_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _leave(monkeypatch, 2, ValueError("boom"))
    (folder / "rank-00001.json").write_text('{"rank": 1, ')
    tell_of_job_step()
    assert "rank 2 of 4" in capsys.readouterr().err
    tell_of_job_step()
    assert capsys.readouterr().err == ""
    assert not folder.exists()


def test_nothing_is_left_where_nobody_asks_or_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    assert not leave(ValueError("x"), 1)
    (tmp_path / "file").touch()
    monkeypatch.setenv(FOLDER, str(tmp_path / "file" / "folder"))
    assert not leave(ValueError("x"), 1)
    # A container's own file system: what would be written there is gone with it.
    monkeypatch.setenv(FOLDER, str(tmp_path / "elsewhere"))
    assert not leave(ValueError("x"), 1)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("rank", [0, 3])
def test_where_nobody_gathers_each_rank_tells_of_itself(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(TORCHRUN, raising=False)
    monkeypatch.setenv("RANK", str(rank))
    tell_alone(UserError("give out=…"))
    assert capsys.readouterr().err == ("ibq-scale: rank 3: give out=…\n" if rank else "ibq-scale: give out=…\n")
    tell_alone(_fail(ValueError("boom")))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Traceback (most recent call last):"
    assert said[-1] == f"ibq-scale: rank {rank}: ValueError: boom"


def test_an_error_is_one_line_with_its_notes() -> None:
    error = ValueError("two\n  lines")
    error.add_note("(traceback in rank-00000.log)")
    assert describe(error) == "ValueError: two lines (traceback in rank-00000.log)"
    assert describe(UserError("give out=…")) == "give out=…"
