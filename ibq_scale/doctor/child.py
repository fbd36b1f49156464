"""Runs one check in its own process: ``python -m ibq_scale.doctor.child MODULE:FUNCTION SECONDS ANSWER``.

The subject comes by standard input, and the findings go to the file ANSWER. A crash, a hang or a print of a library
stays in this process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from dataclasses import asdict
from math import ceil
from pathlib import Path

from ibq_scale.doctor.tools import Subject, first
from ibq_scale.errors import UserError
from ibq_scale.findings import fail


def main(name: str, seconds: str, answer: str) -> None:
    """Runs the check and writes its findings."""
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
