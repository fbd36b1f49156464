"""Real ranks that hang: the others end themselves with the code for it, and name who did not arrive."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

import ibq_scale.supervise.watchdog as watchdog_module
from ibq_scale.distributed.environment import join
from ibq_scale.supervise.watchdog import HUNG_EXIT_CODE, Watchdog
from tests.nursery import Forked, nursery, rank_environ

TIMEOUT = 4.0
HOSTS = ("node0", "node1", "node2")


def train(run_dir: Path, victim: int, how: str) -> None:
    """A loop of collectives in which one rank stops at step 3, in one way or another."""
    with join() as world:
        logging.basicConfig(filename=run_dir / "logs" / f"rank-{world.rank:05d}.log")
        tell = (run_dir / f"told-{world.rank}").write_text
        with closing(Watchdog(run_dir, world, HOSTS, TIMEOUT, start_step=0, hung=tell)) as watchdog:
            if how == "goes on":
                # The first step may take longer: it compiles.
                time.sleep(1.5 * TIMEOUT)
            for step in range(1, 5):
                if step == 4 and world.rank == victim:
                    _stop(watchdog, how)
                dist.barrier()
                watchdog.step_ended(step)
            # Nobody hung. What counts is progress, not steps: a save may take long if it reports.
            for _ in range(6):
                time.sleep(TIMEOUT / 4)
                watchdog.report("save")


def _stop(watchdog: Watchdog, how: str) -> None:
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "waits":
        watchdog.report("waiting for data")
        time.sleep(3600)
    if how == "exits":
        os._exit(3)


def hold_pythons_lock(run_dir: Path) -> None:
    """No thread of Python runs any more, as in C code that hangs."""
    watchdog_module.LAST_RESORT_SECONDS = 0.5
    with join() as world, closing(Watchdog(run_dir, world, HOSTS, 0.4, start_step=0)):
        ctypes.PyDLL(None).sleep(3600)


def _run(folder: Path, victim: int, how: str, size: int = 3) -> list[Forked]:
    (folder / "logs").mkdir()
    return [nursery().start(partial(train, folder, victim, how), environ) for environ in rank_environ(size)]


def _ended(ranks: list[Forked], but: int | None = None) -> list[str]:
    """What they wrote to stderr, those that end, each within a minute; kills the one that does not."""
    try:
        return ["" if rank == but else process.communicate()[1] for rank, process in enumerate(ranks)]
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_stopped_rank_is_named_by_the_others(tmp_path: Path) -> None:
    ranks = _run(tmp_path, victim=1, how="stopped")
    said = _ended(ranks, but=1)
    assert [process.returncode for process in ranks] == [HUNG_EXIT_CODE, -signal.SIGKILL, HUNG_EXIT_CODE], said
    line = "step 4 does not end: no progress for 4 s (train.hang_timeout). rank 1 on node1: no sign of life"
    assert line in said[0]
    for rank in (0, 2):
        told = (tmp_path / "logs" / f"rank-{rank:05d}.log").read_text()
        assert line in told
        assert "the other 2 are in barrier after step 3" in told
        stacks = (tmp_path / "logs" / f"stacks-rank-{rank:05d}.txt").read_text()
        assert "in barrier" in stacks
        assert f'"{Path(__file__)}"' in stacks
        assert (tmp_path / "logs" / "flight-record" / f"rank_{rank}").stat().st_size > 0
    assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 3
    # Rank 0 tells for all.
    assert [path.name for path in tmp_path.glob("told-*")] == ["told-0"]
    assert line in (tmp_path / "told-0").read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_lives_but_does_not_come_is_named_with_what_it_does(tmp_path: Path) -> None:
    """Here rank 0, which also ends, and not before the others have read what was found."""
    ranks = _run(tmp_path, victim=0, how="waits")
    said = _ended(ranks)
    assert [process.returncode for process in ranks] == [HUNG_EXIT_CODE] * 3, said
    line = "rank 0 on node0: alive, in waiting for data after step 3; the other 2 are in barrier after step 3"
    for rank in range(3):
        assert line in (tmp_path / "logs" / f"rank-{rank:05d}.log").read_text()
    assert "sleep" not in said[1]
    assert "in _stop" in (tmp_path / "logs" / "stacks-rank-00000.txt").read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_where_the_stopped_rank_is_the_meeting_point_the_others_say_so(tmp_path: Path) -> None:
    ranks = _run(tmp_path, victim=0, how="stopped")
    said = _ended(ranks, but=0)
    assert [process.returncode for process in ranks[1:]] == [HUNG_EXIT_CODE] * 2, said
    assert "rank 0 on node0 does not answer" in said[1]
    assert sorted(path.name for path in tmp_path.glob("told-*")) == ["told-1", "told-2"]


@pytest.mark.slow
@pytest.mark.distributed
def test_progress_that_is_reported_keeps_the_watchdog_quiet(tmp_path: Path) -> None:
    begin = time.time()
    ranks = _run(tmp_path, victim=1, how="goes on", size=2)
    said = _ended(ranks)
    assert [process.returncode for process in ranks] == [0, 0], said
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["phase"], beat["host"]) == (4, "save", "node0")
    # Neither the first step nor the save that follows.
    assert 0 < beat["step_s"] < TIMEOUT
    assert begin < beat["time"] <= time.time()


@pytest.mark.slow
def test_c_code_that_keeps_pythons_lock_cannot_keep_the_process(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    program = f"from {__name__} import Path, hold_pythons_lock; hold_pythons_lock(Path({str(tmp_path)!r}))"
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID")}
    done = subprocess.run([sys.executable, "-c", program], env=alone, capture_output=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "in hold_pythons_lock" in (tmp_path / "logs" / "stacks-rank-00000.txt").read_text()
