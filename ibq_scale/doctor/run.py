"""Runs the checks, each in a process with a time limit. Most run side by side, the measuring ones alone.

The process is ``python -m ibq_scale.doctor.run MODULE:FUNCTION SECONDS ANSWER``. Its input is the subject, and
its findings go to the file ANSWER. A crash, a hang or a print of a library stays in this process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

from ibq_scale.doctor.tools import Subject, first
from ibq_scale.errors import UserError
from ibq_scale.findings import Finding, fail

POLL_SECONDS = 0.02
# Variables of launchers. A check is not a rank of the surrounding job.
OF_RANKS: tuple[str, ...] = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_RANKS += ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_NTASKS")


@dataclass(frozen=True)
class Check:
    """`function`: ``module:name``, from a Subject to findings. `alone`: it measures, so no other check may run.

    `needs`: a required field of the subject. Without it the check is left out.
    """

    title: str
    function: str
    seconds: float
    alone: bool = False
    needs: str | None = None


# In the order of the report. Checks with an import of torch have time for a cold shared file system.
CHECKS = (
    Check("packages", "ibq_scale.doctor.software:packages", 15),
    Check("machine", "ibq_scale.doctor.machine:machine", 15),
    Check("GPUs", "ibq_scale.doctor.gpus:topology", 30),
    Check("device", "ibq_scale.doctor.gpus:device", 90),
    Check("DeepSpeed", "ibq_scale.doctor.software:deepspeed", 90),
    Check("weights", "ibq_scale.doctor.software:weights", 30),
    Check("W&B", "ibq_scale.doctor.software:wandb", 10),
    Check("Slurm", "ibq_scale.doctor.slurm:slurm", 40),
    Check("run directory", "ibq_scale.doctor.disks:run_directory", 30, alone=True),
    Check("cache folder", "ibq_scale.doctor.disks:cache_folder", 30, alone=True),
    Check("data", "ibq_scale.doctor.data:store", 40, alone=True, needs="data"),
    Check("all-reduce", "ibq_scale.doctor.ranks:all_reduce", 100, alone=True),
)


def examine(subject: Subject, checks: Sequence[Check] = CHECKS) -> Iterator[Finding]:
    """The findings of all checks in their order, as they come. A crashed or hung check is a FAIL line.

    The total time is at most the sum of the limits of the measuring checks, plus the longest limit of the others.
    """
    due = [check for check in checks if check.needs is None or getattr(subject, check.needs) is not None]
    with tempfile.TemporaryDirectory(prefix="ibq_scale-doctor-", ignore_cleanup_errors=True) as folder:
        running: dict[Check, _Child] = {}
        # Files instead of pipes: a child of a check may hold a pipe open after the check's end.
        asked = Path(folder) / "subject.json"
        asked.write_text(json.dumps(asdict(subject)), encoding="utf-8")
        try:
            for check in due:
                if not check.alone:
                    running[check] = _Child(check, asked)
            for check in due:
                if check.alone:
                    for other in running.values():
                        other.wait()
                    running[check] = _Child(check, asked)
                yield from running[check].lines()
        finally:
            for child in running.values():
                child.end()


class _Child:
    def __init__(self, check: Check, asked: Path) -> None:
        self.check = check
        self._answer = asked.parent / f"{check.function}.json"
        self._said = asked.parent / f"{check.function}.log"
        self._deadline = time.monotonic() + check.seconds
        words = [sys.executable, "-m", "ibq_scale.doctor.run", check.function, str(check.seconds), str(self._answer)]
        with asked.open(encoding="utf-8") as given, self._said.open("w", encoding="utf-8") as said:
            self._process = subprocess.Popen(
                words,
                stdin=given,
                stdout=said,
                stderr=said,
                env={name: value for name, value in os.environ.items() if name not in OF_RANKS},
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until the end of the process or its time limit."""
        while self._process.poll() is None and time.monotonic() < self._deadline:
            time.sleep(POLL_SECONDS)

    def lines(self) -> list[Finding]:
        self.wait()
        code = self._process.poll()
        self.end()
        what = self.check.title
        if code is None:
            todo = "a network file system, a driver or a server hangs"
            return [fail(what, f"no answer within {self.check.seconds:.0f} s", todo)]
        try:
            found = [Finding(**line) for line in json.loads(self._answer.read_text(encoding="utf-8"))]
        except (OSError, ValueError):
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            said = self._said.read_text(errors="replace", encoding="utf-8").strip().splitlines()
            last = f": {said[-1].strip()}" if said else ""
            return [fail(what, f"the check itself died ({how}){last}", "report it. The other lines are valid")]
        return [line if line.name else replace(line, name=what) for line in found]

    def end(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # A process blocked by a dead file system does not end, and is left.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)


def main(name: str, seconds: str, answer: str) -> None:
    """The process of one check."""
    # The parent ends this process in time. The alarm is for a process without a parent.
    signal.alarm(ceil(float(seconds)) + 5)
    os.dup2(2, 1)
    subject = Subject(**json.load(sys.stdin))
    module, _, function = name.partition(":")
    try:
        lines = getattr(importlib.import_module(module), function)(subject)
    except UserError as e:
        lines = [fail("", " ".join(str(e).split()), "")]
    except Exception as e:
        said = f"the check itself failed: {type(e).__name__}: {first(str(e))}"
        lines = [fail("", said, "report it. The other lines are valid")]
    Path(answer).write_text(json.dumps([asdict(line) for line in lines]), encoding="utf-8")
    sys.stdout.flush()
    # Threads and exit handlers of libraries may hang or abort.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
