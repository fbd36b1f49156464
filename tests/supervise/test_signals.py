"""Signals at any time, and again and again: the exit code is 75 and a whole checkpoint stands, in time."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ibq_scale.checkpoint.reading import newest_or_this, verify, whole_checkpoints
from tests.train.runs import ENDLESS, PATIENCE, each_rank, launched, lines, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
# A disk that becomes slow: nothing is ever flushed once the file is there.
SLOW_DISK = """
import os, time
def fsync(fd, real=os.fsync):
    if os.path.exists({flag!r}):
        time.sleep(600)
    real(fd)
os.fsync = fsync
"""


def _children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children()


MOMENTS: dict[str, Callable[[Path, int], bool]] = {
    "imports": lambda run, pid: len(_children(pid)) == 2,
    "meeting": lambda run, pid: (run / "lock").is_dir(),
    "building": lambda run, pid: (run / "heartbeat.json").is_file(),
}


@pytest.mark.parametrize(
    ("moment", "signum"), [("imports", signal.SIGINT), ("meeting", signal.SIGTERM), ("building", signal.SIGUSR1)]
)
def test_a_signal_in_start_up_asks_for_a_requeue(dataset: str, tmp_path: Path, moment: str, signum: int) -> None:
    """Ctrl-C reaches the ranks from the terminal, SIGTERM through the launcher."""
    run = tmp_path / "run"
    with launched(dataset, run, *ENDLESS) as process:
        wait_until(lambda: MOMENTS[moment](run, process.pid), process)
        for target in [process, *(_children(process.pid) if signum == signal.SIGINT else [])]:
            target.send_signal(signum)
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 75, said
    assert "stopped at step 0 by a signal" in said
    assert "Traceback" not in said
    assert lines(run) == []


def test_signals_again_and_again_change_nothing(dataset: str, tmp_path: Path) -> None:
    """To the launcher and to both ranks, in the save, in the report, to the end."""
    run = tmp_path / "run"
    sent = 0
    with launched(dataset, run, *ENDLESS, "train.checkpoint_every=3") as process:
        wait_until(lambda: len(lines(run)) > 1, process)
        ranks = _children(process.pid)
        while process.poll() is None:
            for target in (process, *ranks):
                with suppress(psutil.NoSuchProcess):
                    target.send_signal((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)[sent % 3])
                sent += 1
            time.sleep(0.01)
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 75, said
    assert sent > 30
    assert "Traceback" not in said
    newest = newest_or_this(run)
    assert newest.step == lines(run)[-1]["step"]
    assert verify(newest) == []
    assert (run / "report.html").is_file()


def test_a_save_that_the_grace_time_is_too_short_for_leaves_the_one_before(dataset: str, tmp_path: Path) -> None:
    """Every rank leaves with 75 at the same time: srun takes the highest code of all."""
    run, flag = tmp_path / "run", tmp_path / "slow"
    more = (*ENDLESS, "train.checkpoint_every=2", "train.grace=3")
    with each_rank(dataset, run, *more, before=SLOW_DISK.format(flag=str(flag))) as ranks:
        wait_until(lambda: len(whole_checkpoints(run / "checkpoints")) > 1, *ranks)
        flag.touch()
        begin = time.monotonic()
        ranks[1].send_signal(signal.SIGUSR1)
        said = ranks[0].communicate(timeout=PATIENCE)[1]
        took = time.monotonic() - begin
        assert (ranks[0].returncode, ranks[1].wait()) == (75, 75), said
    assert took > 2.5, said
    found = re.search(
        r"the 3 s after the signal \(train\.grace\) are over before all is saved: (step-\d+) stands, whose save took "
        r"\d+\.\d s\. The same command goes on from there",
        said,
    )
    assert found is not None, said
    whole = {checkpoint.path.name: checkpoint for checkpoint in whole_checkpoints(run / "checkpoints")}
    assert verify(whole[found[1]]) == []


def test_a_signalled_rank_whose_step_does_not_end_leaves_in_time_by_itself(dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with each_rank(dataset, run, *ENDLESS, "train.grace=3") as ranks:
        wait_until(lambda: len(lines(run)) > 1, *ranks)
        ranks[1].send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        ranks[0].send_signal(signal.SIGTERM)
        said = ranks[0].communicate(timeout=PATIENCE)[1]
        assert ranks[0].returncode == 75, said
        assert time.monotonic() - begin > 2.5
    assert "there is no checkpoint yet" in said


def test_a_hang_that_the_watchdog_found_first_keeps_its_own_code(dataset: str, tmp_path: Path) -> None:
    """The grace time ends while it is asked who is missing: what hangs must not come back by itself."""
    run = tmp_path / "run"
    with each_rank(dataset, run, *ENDLESS, "train.grace=13", "train.hang_timeout=12") as ranks:
        wait_until(lambda: len(lines(run)) > 1, *ranks)
        ranks[1].send_signal(signal.SIGSTOP)
        ranks[0].send_signal(signal.SIGTERM)
        said = ranks[0].communicate(timeout=PATIENCE)[1]
        assert ranks[0].returncode == 70, said
    assert "rank 1 on" in said
