"""Runs from the command line that meet a stopped rank, a second job, dead data workers: they end, and say why."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests import nursery
from tests.docs.pages import flat, section, setting
from tests.nursery import PATIENCE, Forked
from tests.train.runs import ENDLESS, data_workers, each_rank, words

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def _command(data: str, out: Path, *more: str) -> list[str]:
    return words(data, out, "train.steps=100000", *more)


def _steps(run: Path, count: int, process: Forked) -> None:
    """Waits until `count` steps are logged."""
    deadline = time.monotonic() + PATIENCE
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _line(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_rank_stopped_within_a_step_ends_the_run_with_its_name(dataset: str, tmp_path: Path) -> None:
    """Launched as srun does it: each rank's own code counts."""
    run = tmp_path / "run"
    with each_rank(dataset, run, *ENDLESS, "train.hang_timeout=12") as ranks:
        _steps(run, 3, ranks[0])
        ranks[1].send_signal(signal.SIGSTOP)
        said = ranks[0].communicate()[1]
    assert ranks[0].returncode == 70, said
    host = socket.gethostname()
    assert f"(train.hang_timeout). rank 1 on {host}: no sign of life" in said
    found = section("HANG:", said)
    assert found == section("no sign of life", said)
    assert "exit code 70" in flat(found)
    assert "the same command goes on" in flat(found)
    (pattern,) = re.findall(r"`RUN/(logs/stacks-\S+)`", found)
    assert any(path.stat().st_size for path in run.glob(pattern))
    # Where it waits depends on the moment: in one of the step's collectives, or in the one after it.
    stacks = (run / "logs" / "stacks-rank-00000.txt").read_text()
    assert "distributed_c10d.py" in stacks
    assert "trainer.py" in stacks
    line = _line(run)
    assert 0 < line["own_step_s_p50"] <= line["own_step_s_p95"] <= line["own_step_s_max"] <= line["step_s"] * 1.5
    assert json.loads((run / "heartbeat.json").read_text())["step"] >= 3


def test_a_second_job_on_the_run_directory_is_refused_and_the_first_goes_on(dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = _command(dataset, run, "data.workers=0")
    first = nursery.command([*command, "--ranks", "1"])
    _steps(run, 1, first)
    second = nursery.run([*command, "--ranks", "2"])
    assert second.returncode == 2, second.stderr
    rank0 = psutil.Process(first.pid).children()[0].pid
    assert f"another job trains in {run}: process {rank0} on {socket.gethostname()}, since" in second.stderr
    assert "Traceback" not in second.stderr
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 75, first.communicate()[1]


def test_dead_data_workers_end_the_run(dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = _command(dataset, run, "data.workers=1", f"data.cache_dir={tmp_path / 'cache'}", "--ranks", "2")
    process = nursery.command(command)
    _steps(run, 2, process)
    workers = data_workers(process.pid)
    assert len(workers) == 2
    workers[0].kill()
    said = process.communicate()[1]
    assert process.returncode == 1, said
    told = [line for line in said.splitlines() if line.startswith("ibq-scale: ")]
    assert re.match(
        r"ibq-scale: rank \d of 2 on .* failed first: DataWorkerDiedError: a data worker on .*"
        r"\(traceback in .*/logs/rank-0000\d",
        told[-1],
    ), said
    assert len(told) == 2, "and one for the other rank"
    assert setting("data.workers", section("a data worker on", said)) == "data.workers=0"
    assert "terminate called" not in said
    logs = [path.read_text() for path in sorted((run / "logs").glob("rank-*.log"))]
    assert sum("ERROR ibq_scale.data.stream: a data worker on" in text for text in logs) == 1
