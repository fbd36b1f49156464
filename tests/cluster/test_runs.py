"""How runs are said to stand, and how they are stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from ibq_scale.checkpoint.reading import manifest_text
from ibq_scale.cluster import cancel as cancel_module
from ibq_scale.cluster.cancel import cancel, wait
from ibq_scale.cluster.runs import Run, describe, known_runs
from ibq_scale.cluster.slurm import my_jobs
from ibq_scale.config.layers import resolve, to_yaml
from ibq_scale.errors import UserError
from ibq_scale.supervise.run_lock import Holder
from tests.cluster.fake_slurm import FakeSlurm

# Holds the lock of a run until it is asked to save.
TRAINS = """
import signal, sys
from pathlib import Path
from ibq_scale.supervise.run_lock import RunLock
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
signal.sigwait([signal.SIGUSR1])
lock.release()
sys.exit(75)
"""


@pytest.fixture
def run(slurm: FakeSlurm, tmp_path: Path) -> Path:
    """A run of 300 steps of 16, at step 100 of which it saved."""
    run = tmp_path / "runs/tok"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(resolve("tokenizer/tiny", ["data.train=x"]).config))
    _save(run, 100)
    return run


@pytest.fixture
def trainer(run: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", TRAINS, str(run)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def _save(run: Path, step: int) -> None:
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(
        manifest_text({"format_version": 3, "step": step, "samples": 0, "files": {}, "config": {}})
    )


def _beat(run: Path, step: int, step_s: float | None, phase: str = "step") -> None:
    beat = {"step": step, "step_s": step_s, "phase": phase, "host": "here", "time": time.time(), "pid": 1}
    (run / "heartbeat.json").write_text(json.dumps(beat))


def _attempt(run: Path, job: str, code: int) -> None:
    with (run / "attempts.jsonl").open("a") as f:
        line = {"job": job, "restart": 0, "code": code, "step_before": 0, "step_after": 0}
        f.write(json.dumps(line) + "\n")


def _now(run: Path) -> Run:
    return describe(run, my_jobs())


def test_a_running_job(slurm: FakeSlurm, run: Path) -> None:
    _beat(run, 120, 0.5)
    slurm.queue(f"8|PENDING|2||Dependency|ibq-scale {run}", f"7|RUNNING|2|node[0-1]|None|ibq-scale {run}")
    now = _now(run)
    assert now == Run(str(run), "running", "", 120, 300, 32.0, 90.0, 100, ("7", "8"), "node[0-1]")
    _beat(run, 100, None, "loading")
    assert (_now(run).why, _now(run).eta_s) == ("loading", None)


def test_a_queued_and_a_requeued_job(slurm: FakeSlurm, run: Path) -> None:
    _beat(run, 120, 0.5)
    slurm.queue(f"7|PENDING|2||Priority|ibq-scale {run}")
    now = _now(run)
    assert (now.state, now.why, now.step, now.images_per_s) == ("queued", "Priority", 100, None)
    _attempt(run, "7", 75)
    assert _now(run).state == "requeued"


def test_a_job_that_has_not_begun_is_known_by_its_submission(slurm: FakeSlurm, tmp_path: Path) -> None:
    new = tmp_path / "new"
    folder = new / "submitted/001"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(resolve("tokenizer/tiny", ["data.train=x"]).config))
    (folder / "submission.json").write_text('{"jobs": ["7"]}')
    slurm.queue("7|PENDING|2||Priority|")
    now = _now(new)
    assert (now.state, now.step, now.steps, now.jobs) == ("queued", None, 300, ("7",))


def test_how_a_run_ended(run: Path) -> None:
    assert _now(run).state == "stopped"
    _attempt(run, "7", 1)
    (run / "attempts.jsonl").open("a").write('{"job": "7", "co\n')
    assert (_now(run).state, _now(run).why) == ("failed", "code 1")
    _attempt(run, "8", 75)
    assert _now(run).state == "stopped"
    _save(run, 300)
    assert (_now(run).state, _now(run).step) == ("finished", 300)


def test_a_run_without_slurm_is_known_by_its_lock(run: Path, trainer: subprocess.Popen[str]) -> None:
    _beat(run, 120, 0.5)
    now = _now(run)
    assert (now.state, now.step, now.nodes, now.jobs) == ("running", 120, "here", ())
    trainer.kill()
    trainer.wait()
    now = _now(run)
    assert (now.state, now.step) == ("failed", 100)
    assert f"its process is gone (process {trainer.pid}" in now.why


def test_a_run_of_another_host_lives_while_its_lock_is_touched(run: Path) -> None:
    (run / "lock").mkdir()
    lock = run / "lock/00000001"
    lock.write_text(json.dumps(asdict(Holder.me()) | {"host": "elsewhere", "boot": "another"}))
    assert _now(run).state == "running"
    os.utime(lock, (time.time() - 3600,) * 2)
    assert _now(run).state == "failed"


def test_runs_are_found_in_the_queue_and_in_the_usual_folder(
    slurm: FakeSlurm, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    slurm.queue("7|PENDING|2||Priority|ibq-scale /elsewhere/a|b", "8|RUNNING|1|n|None|not ours", "9|RUNNING|1|n|None|")
    assert known_runs(my_jobs()) == [Path("/elsewhere/a|b"), run]


def test_what_is_no_run_is_refused(slurm: FakeSlurm, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        describe(tmp_path, my_jobs())


def test_cancel_drops_what_waits_first_and_lets_the_rest_save(slurm: FakeSlurm, run: Path) -> None:
    slurm.queue(
        f"7|RUNNING|2|node[0-1]|None|ibq-scale {run}",
        f"8|PENDING|2||Dependency|ibq-scale {run}",
        f"9|PENDING|2||Dependency|ibq-scale {run}",
        "10|RUNNING|2|node[2-3]|None|ibq-scale /elsewhere",
    )
    asked = cancel(run)
    assert (asked.dropped, asked.saving) == (("8", "9"), ("7",))
    assert slurm.calls == ["scancel 8 9", "scontrol update JobId=7 Requeue=0", "scancel --signal=USR1 7"]
    assert wait(asked, 5.0)


def test_cancel_says_when_a_job_stays(slurm: FakeSlurm, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel_module, "POLL_SECONDS", 0.01)
    line = f"7|RUNNING|2|node[0-1]|None|ibq-scale {run}"
    slurm.queue(line)
    asked = cancel(run)
    slurm.queue(line)
    assert not wait(asked, 0.1)


def test_cancel_without_slurm_asks_the_process(run: Path, trainer: subprocess.Popen[str]) -> None:
    asked = cancel(run)
    assert trainer.wait(300) == 75
    assert asked.process is not None
    assert wait(asked, 5.0)
    assert _now(run).state == "stopped"
    with pytest.raises(UserError, match="no run is active"):
        cancel(run)


def test_cancel_does_not_signal_a_pid_of_another_host(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, signum: killed.append(pid))
    (run / "lock").mkdir()
    holder = asdict(Holder.me()) | {"host": "elsewhere", "boot": "another"}
    (run / "lock/00000001").write_text(json.dumps(holder))
    with pytest.raises(UserError, match=r"on elsewhere.*run this there"):
        cancel(run)
    (run / "lock/00000001").write_text(json.dumps(asdict(Holder.me()) | {"start": 1}))
    with pytest.raises(UserError, match="no run is active"):
        cancel(run)
    assert killed == []
