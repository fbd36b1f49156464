"""One job at a time on a run directory: real processes, real ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ibq_scale.errors import UserError
from ibq_scale.supervise import run_lock
from ibq_scale.supervise.run_lock import Holder, RunLock
from tests.nursery import PATIENCE

# Takes the lock, says so, and holds it until its input ends; 2 where it is refused.
HOLDER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from ibq_scale.errors import UserError
from ibq_scale.supervise import run_lock
run_lock.PATIENCE_SECONDS, run_lock.BEAT_SECONDS = 0.5, 0.2
try:
    lock = run_lock.RunLock(Path(sys.argv[1]))
except UserError as e:
    print(e, flush=True)
    sys.exit(2)
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.2)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


def _start(run: Path, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environ,
    )


@contextmanager
def _holder(run: Path, **environ: str) -> Iterator[subprocess.Popen[str]]:
    process = _start(run, **environ)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _refuse_to_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a lock that is not free at the first look fail the test."""

    def sleep(seconds: float) -> None:
        pytest.fail("the lock was not free at once")

    clock = SimpleNamespace(sleep=sleep, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(run_lock, "time", clock)


@contextmanager
def _touched_in_the_first_pause(path: Path) -> Iterator[None]:
    """The holder of this lock shows life as soon as it is waited for."""
    clock = SimpleNamespace(sleep=lambda _: os.utime(path), time=time.time, monotonic=time.monotonic)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lock, "time", clock)
        yield


def _leave(run: Path, holder: Holder, age: float = 0.0) -> Path:
    """A lock as another node's job left it, last touched `age` seconds ago."""
    path = run / "lock" / "00000007"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@pytest.mark.slow
def test_a_second_job_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with _holder(tmp_path, SLURM_JOB_ID="4711") as first:
        with pytest.raises(UserError) as told:
            RunLock(tmp_path)
        holder = Holder(**json.loads((tmp_path / "lock" / "00000001").read_text()))
        assert f"process {first.pid} on {holder.host}, Slurm job 4711, since {holder.since}" in str(told.value)
        first.communicate("")
        assert first.returncode == 0
    RunLock(tmp_path).release()


@pytest.mark.slow
def test_after_kill_9_the_next_has_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _holder(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        _refuse_to_pause(monkeypatch)
        RunLock(tmp_path).release()


@pytest.mark.slow
def test_of_many_takers_one_wins_again_and_again(tmp_path: Path) -> None:
    """The second round begins with a lock whose holder was killed."""
    for _ in range(2):
        takers = [_start(tmp_path) for _ in range(4)]
        lines = [taker.stdout.readline() for taker in takers if taker.stdout is not None]
        assert lines.count("held\n") == 1, lines
        assert sum("another job trains" in line for line in lines) == 3
        for taker in takers:
            taker.kill()
            taker.communicate()


def test_of_many_threads_that_find_a_free_lock_one_creates_the_next(tmp_path: Path) -> None:
    """Between threads the window between looking and creating is met often."""
    lock = RunLock(tmp_path)
    lock.release()

    def take(_: int) -> int | None:
        other = object.__new__(RunLock)
        other.folder = lock.folder
        number = other._highest()
        return number + 1 if other._is_free(number) and other._create(number + 1) else None

    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            won = [number for number in pool.map(take, range(8)) if number is not None]
        assert len(won) == 1
        (lock.folder / f"{won[0]:08d}").write_text(json.dumps(asdict(replace(Holder.me(), released=True))))


def test_a_number_that_was_overtaken_is_not_kept(tmp_path: Path) -> None:
    """Whoever looked long ago may create a number that has been removed since: the higher one holds."""
    lock = RunLock(tmp_path)
    lock.release()
    late = object.__new__(RunLock)
    late.folder = lock.folder
    (tmp_path / "lock" / "00000001").rename(tmp_path / "lock" / "00000003")
    assert not late._create(2)
    assert [p.name for p in late.folder.iterdir()] == ["00000003"]


def test_a_requeued_job_and_a_rebooted_host_need_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    elsewhere = replace(Holder.me(), host="node7", boot="b", pid=1)
    _leave(tmp_path / "requeued", replace(elsewhere, restart=None))
    _leave(tmp_path / "rebooted", replace(Holder.me(), boot="before", job="1"))
    _refuse_to_pause(monkeypatch)
    for name in ("requeued", "rebooted"):
        RunLock(tmp_path / name).release()


@pytest.mark.slow
def test_a_job_on_another_host_is_gone_when_its_file_is_old_by_the_file_systems_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = replace(Holder.me(), host="node7", boot="b")
    _leave(tmp_path / "old", elsewhere, age=run_lock.STALE_SECONDS + 1)
    # Whatever this node thinks that the time is.
    monkeypatch.setattr(time, "time", lambda: 0.0)
    RunLock(tmp_path / "old").release()


@pytest.mark.slow
def test_a_file_systems_clock_that_jumps_takes_no_lock_from_a_living_job_nor_keeps_a_dead_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day ahead, a living holder's last touch looks old; a day back, a dead one's is never old enough."""
    elsewhere = replace(Holder.me(), host="node7", boot="b")
    path = _leave(tmp_path / "ahead", elsewhere, age=86400.0)
    with _touched_in_the_first_pause(path), pytest.raises(UserError, match="on node7, since"):
        RunLock(tmp_path / "ahead")
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.0)
    _leave(tmp_path / "back", elsewhere, age=-86400.0)
    RunLock(tmp_path / "back").release()


@pytest.mark.slow
def test_a_job_on_another_host_that_shows_life_is_waited_for_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _leave(tmp_path, replace(Holder.me(), host="node7", boot="b"), age=100.0)
    with _touched_in_the_first_pause(path), pytest.raises(UserError, match="on node7, since"):
        RunLock(tmp_path)
    assert "waiting for a sign of life" in capsys.readouterr().err


@pytest.mark.slow
def test_a_holder_that_was_taken_for_gone_ends_itself(tmp_path: Path) -> None:
    with _holder(tmp_path) as first:
        (tmp_path / "lock" / "00000002").write_text("{}")
        assert first.wait(PATIENCE) == 1


@pytest.mark.slow
def test_who_died_before_it_wrote_its_name_holds_the_lock_for_a_minute_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "NAMELESS_SECONDS", 1.0)
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "00000007").touch()
    RunLock(tmp_path).release()
    assert "is locked by an unknown process: waiting for a sign of life, at most 1 s" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "lock").iterdir()] == ["00000008"]


def test_a_directory_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in its place")
    with pytest.raises(UserError, match=r"cannot write to .*run"):
        RunLock(tmp_path / "run")
