"""Checks that go wrong, for processes that import them by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ibq_scale.doctor.tools import Subject
from ibq_scale.errors import UserError
from ibq_scale.findings import Finding, ok, warn


def well(subject: Subject) -> list[Finding]:
    print("a library says something")
    return [ok("", f"data {subject.data}"), warn("second", "seen", "do it")]


def misused(subject: Subject) -> list[Finding]:
    raise UserError("the bucket does not exist:\nmake it")


def crashes(subject: Subject) -> list[Finding]:
    raise KeyError("unforeseen")


def dies(subject: Subject) -> list[Finding]:
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return []


def hangs(subject: Subject) -> list[Finding]:
    started = subprocess.Popen(["sleep", "3600"])
    Path(str(subject.run_dir)).write_text(str(started.pid))
    time.sleep(3600)
    return []


def rank(subject: Subject) -> list[Finding]:
    return [ok("rank", os.environ.get("RANK", "none"))]
