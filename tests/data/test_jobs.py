"""Jobs give their results in order, tell how far they are, and end with one line when a process is killed."""

from __future__ import annotations

import io
import os
import signal
import time
from types import SimpleNamespace

import pytest

from ibq_scale.data import progress as progress_module
from ibq_scale.data.jobs import Report, run_jobs
from ibq_scale.data.progress import Progress
from ibq_scale.errors import UserError


def _double(job: int, report: Report) -> int:
    # The first jobs take longest.
    time.sleep(0.02 * (5 - job) if job < 5 else 0)
    report(1, 10, 0)
    return 2 * job


def _fail(job: int, report: Report) -> int:
    if job == 2:
        raise UserError("job 2 is bad")
    return job


def _die(job: int, report: Report) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return job


class _Shown(Progress):
    last = (0, 0, 0)

    def show(self, images: int, worked: int, skipped: int) -> None:
        self.last = (images, worked, skipped)


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_and_totals_add_up(workers: int) -> None:
    shown = _Shown("x", 120)
    assert list(run_jobs(_double, range(12), workers=workers, progress=shown)) == list(range(0, 24, 2))
    assert shown.last == (12, 120, 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_of_a_job_ends_the_work(workers: int) -> None:
    results = run_jobs(_fail, range(1000), workers=workers, progress=Progress("x", 1))
    with pytest.raises(UserError, match="job 2 is bad"):
        list(results)


def test_a_killed_process_is_said_in_a_line() -> None:
    with pytest.raises(UserError, match=r"a worker process was killed.*fewer --workers"):
        list(run_jobs(_die, range(4), workers=2, progress=Progress("x", 1)))


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_terminal_has_one_line_rewritten(clock: list[float]) -> None:
    out = _Terminal()
    progress = Progress("prepare", 1000, out)
    for second in range(1, 11):
        clock[0] = float(second)
        progress.show(5 * second, 80 * second, 200)
    progress.close()
    lines = out.getvalue().split("\r")
    assert lines[1] == "prepare: 5 images, 5/s, 28%, 9s left\x1b[K"
    assert lines[-1] == "prepare: 50 images, 5/s, 100%\x1b[K\n"
    assert out.getvalue().count("\n") == 1


def test_a_log_has_a_line_now_and_then_and_none_for_a_short_job(clock: list[float]) -> None:
    out = io.StringIO()
    progress = Progress("verify", 10**6, out)
    for second in range(100):
        clock[0] = float(second)
        progress.show(10 * second, 100 * second, 0)
    progress.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "verify: 300 images, 10/s, 0%, 2h46m left"
    out = io.StringIO()
    short = Progress("verify", 100, out)
    short.show(10, 100, 0)
    short.close()
    assert out.getvalue() == ""
