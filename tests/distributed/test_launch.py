"""The launcher: exit codes come back as they are, signals reach every rank, nobody is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.nursery import PATIENCE

# Stands in for the command line: the launcher starts ``python -m ibq_scale WORDS`` and this package shadows it.
RANK_PROGRAM = """
import os, pathlib, signal, sys, time
what, folder = sys.argv[1], pathlib.Path(sys.argv[2])
rank = os.environ["RANK"]
(folder / f"started-{rank}").write_text(f"{os.getpid()} {os.environ['WORLD_SIZE']} {os.environ['OMP_NUM_THREADS']}")
if what == "codes":
    sys.exit(7 if rank == "1" else 0)
if what in ("fail", "mistake", "kill"):
    from ibq_scale.distributed.failures import leave
    from ibq_scale.errors import UserError
    if rank == "0":
        while not (folder / "ended-1").exists():
            time.sleep(0.01)
        leave(RuntimeError("Connection closed by peer"), 1)
        os._exit(1)
    (folder / "ended-1").touch()
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    leave(UserError("no such file") if what == "mistake" else ValueError("boom"), 2 if what == "mistake" else 1)
    os._exit(2 if what == "mistake" else 1)
if what == "signal":
    asking = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    for number in asking:
        signal.signal(number, lambda *a: ((folder / f"asked-{rank}").touch(), sys.exit(75)))
    # Held back from the rank's first moment on, until it can answer: time enough for a signal to come before.
    (folder / f"held-{rank}").touch()
    time.sleep(1.0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, asking)
time.sleep(3600)
"""
LAUNCHER = """
import sys
import ibq_scale.distributed.launch as launch
launch.GRACE_SECONDS = 1.0
real = launch.subprocess.Popen
def popen(command, **kwargs):
    return real([sys.executable, sys.argv[1], *command[3:]], **kwargs)
launch.subprocess.Popen = popen
sys.exit(launch.launch(sys.argv[2:], ranks=2))
"""


def _launch(tmp_path: Path, what: str) -> subprocess.Popen[bytes]:
    program = tmp_path / "rank.py"
    program.write_text(RANK_PROGRAM)
    return subprocess.Popen([sys.executable, "-c", LAUNCHER, str(program), what, str(tmp_path)], stderr=subprocess.PIPE)


def _wait_for(tmp_path: Path, name: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(list(tmp_path.glob(f"{name}-*"))) < 2:
        assert time.monotonic() < deadline, f"no {name}"
        time.sleep(0.02)
    time.sleep(0.2)


def test_the_first_failures_code_is_returned_and_the_others_ended(tmp_path: Path) -> None:
    launcher = _launch(tmp_path, "codes")
    assert launcher.wait(PATIENCE) == 7


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("fail", 1, "ibq-scale: rank 1 of 2 on .* failed first: ValueError: boom\n$"),
        ("mistake", 2, "^ibq-scale: no such file\n$"),
        ("kill", 128 + signal.SIGKILL, "ibq-scale: rank 1 killed by SIGKILL: the kernel does that"),
    ],
)
def test_what_all_ranks_had_to_say_is_one_message_and_the_code_is_the_causes(
    tmp_path: Path, what: str, code: int, said: str
) -> None:
    launcher = _launch(tmp_path, what)
    assert launcher.stderr is not None
    told = launcher.stderr.read().decode()
    assert launcher.wait(PATIENCE) == code
    assert re.search(said, told), told


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_every_rank_and_their_answer_comes_back(tmp_path: Path, signum: int) -> None:
    """Also those that come before a rank can answer."""
    launcher = _launch(tmp_path, "signal")
    _wait_for(tmp_path, "held")
    launcher.send_signal(signum)
    assert launcher.wait(PATIENCE) == 75
    assert len(list(tmp_path.glob("asked-*"))) == 2


def test_ranks_die_with_their_launcher(tmp_path: Path) -> None:
    launcher = _launch(tmp_path, "sleep")
    _wait_for(tmp_path, "started")
    pids = [int(p.read_text().split()[0]) for p in tmp_path.glob("started-*")]
    launcher.kill()
    launcher.wait(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# A launcher that may be killed between the start of a rank and the rank's request to die with it.
LATE = """
import os, sys, time
from ibq_scale.distributed.launch import _die_with_parent
launcher = os.getpid()
if os.fork() == 0:
    while sys.argv[1] == "gone" and os.getppid() == launcher:
        time.sleep(0.01)
    _die_with_parent(launcher)
    print("trains", flush=True)
    os._exit(0)
if sys.argv[1] == "there":
    os.wait()
"""


@pytest.mark.parametrize(("launcher", "said"), [("there", "trains\n"), ("gone", "")])
def test_a_rank_whose_launcher_is_gone_already_does_not_begin(launcher: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", LATE, launcher], capture_output=True, text=True, check=True)
    assert done.stdout == said
    assert done.stderr == ""
