"""A run outlives whoever reads what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_reader_that_has_gone_stops_nothing() -> None:
    program = "from ibq_scale.console import tell\nfor i in range(20000): tell('line %d' % i)\nprint('done')"
    command = f'{sys.executable} -c "$PROGRAM" 2> >(head -n 1 > /dev/null)'
    done = subprocess.run(
        ["bash", "-c", command], env={"PROGRAM": program}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_full_disk_stops_nothing() -> None:
    program = "from ibq_scale.console import tell\ntell('line')\ntell('line')\nprint('done')"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, text=True, check=False
        )
    assert (done.returncode, done.stdout) == (0, "done\n")
