"""What clusters do to a run, by real means: directories that cannot be written to, clocks that jump, what hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ibq_scale.checkpoint.reading import newest_or_this, whole_checkpoints
from tests.train.runs import ENDLESS, PATIENCE, data_workers, each_rank, launched, lines, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@contextmanager
def _unwritable(folder: Path) -> Iterator[None]:
    """By its mode; for root, whom modes do not bind, by a read-only mount, or where mounting is not allowed, by a file
    in the folder's place.
    """
    if os.geteuid() != 0:
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)
        return
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode == 0:
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
            yield
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
        return
    away = folder.with_name("away")
    folder.rename(away)
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()
        away.rename(folder)


def test_a_run_directory_that_cannot_be_written_to_is_told_at_the_start(dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with _unwritable(run), launched(dataset, run, *ENDLESS) as process:
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 2, said
    assert f"cannot write to {run}" in said
    assert "Traceback" not in said


def test_checkpoints_that_cannot_be_written_are_told_and_the_run_goes_on(dataset: str, tmp_path: Path) -> None:
    """At the end the last step is not on disk: exit code 2. Writable again, the same command goes on."""
    run = tmp_path / "run"
    with launched(dataset, run, *ENDLESS, "train.checkpoint_every=2") as process:
        wait_until(lambda: bool(whole_checkpoints(run / "checkpoints")), process)
        with _unwritable(run / "checkpoints"):
            steps = len(lines(run))
            wait_until(lambda: len(lines(run)) > steps + 6, process)
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 2, said
    assert "THIS CHECKPOINT COULD NOT BE WRITTEN" in said
    assert "could not be saved (see above)" in said
    assert "Traceback" not in said
    stands = newest_or_this(run).step
    assert stands < lines(run)[-1]["step"]
    with launched(dataset, run, f"train.steps={stands + 2}", "data.workers=0") as again:
        said = again.communicate(timeout=PATIENCE)[1]
    assert again.returncode == 0, said
    assert f"resuming from {run}/checkpoints/step-{stands:08d}" in said


# Once training goes on, the wall clock stands a day late, right, or a day early, another one each second.
JUMPS = """
import os, time
def jumping(real=time.time, monotonic=time.monotonic):
    return real() + (86400.0 * (int(monotonic()) % 3 - 1) if os.path.exists({flag!r}) else 0.0)
time.time = jumping
"""


def test_clocks_that_jump_change_nothing(dataset: str, tmp_path: Path) -> None:
    """Also: how long training stood still for saves is logged with the line after each."""
    more = ("train.steps=40", "data.workers=0", "train.checkpoint_every=4", "train.hang_timeout=30")
    losses = []
    for name, before in (("right", ""), ("jumping", JUMPS.format(flag=str(tmp_path / "jumping/metrics.jsonl")))):
        with each_rank(dataset, tmp_path / name, *more, before=before) as ranks:
            said = ranks[0].communicate(timeout=PATIENCE)[1]
            assert (ranks[0].returncode, ranks[1].wait()) == (0, 0), said
        losses.append([line["loss"] for line in lines(tmp_path / name)])
    assert losses[0] == losses[1]
    run = tmp_path / "jumping"
    times = [line["time"] for line in lines(run)]
    assert times == sorted(times)
    assert 0 < times[-1] < PATIENCE
    assert [c.step for c in whole_checkpoints(run / "checkpoints")] == [36, 40]
    assert newest_or_this(run).step == 40
    stalls = {line["step"]: line["save_stall_s"] for line in lines(run)}
    assert {step for step, seconds in stalls.items() if seconds > 0} == set(range(5, 40, 4))
    assert all(0 <= seconds < 30 for seconds in stalls.values())


def test_a_stopped_data_worker_is_ended_by_the_watchdog_and_its_rank_named(dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("train.steps=100000", "data.workers=1", f"data.cache_dir={tmp_path / 'cache'}", "train.hang_timeout=20")
    with each_rank(dataset, run, *more) as ranks:
        wait_until(lambda: len(lines(run)) > 1, *ranks)
        (worker,) = data_workers(ranks[1].pid)
        worker.suspend()
        try:
            said = ranks[0].communicate(timeout=PATIENCE)[1]
        finally:
            # Suspended, it follows no rank's end.
            worker.kill()
        assert (ranks[0].returncode, ranks[1].wait()) == (70, 70), said
    assert f"rank 1 on {socket.gethostname()}: alive, in waiting for data after step" in said


HANGING = """
import os, time, deepspeed
if os.environ["RANK"] == "1":
    deepspeed.initialize = lambda **_: time.sleep(3600)
"""


def test_a_hang_while_the_engines_are_built_is_named_and_ended(dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with each_rank(dataset, run, *ENDLESS, "train.hang_timeout=8", before=HANGING) as ranks:
        said = ranks[0].communicate(timeout=PATIENCE)[1]
        assert (ranks[0].returncode, ranks[1].wait()) == (70, 70), said
    assert "the start (building) does not end: no progress for 24 s (train.hang_timeout). rank 1 on" in said
