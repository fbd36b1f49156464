"""Output of long runs, and the format of numbers in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def rank() -> int:
    """This process's rank from its launcher, 0 without one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def tells() -> bool:
    """Whether this process prints for all ranks."""
    return rank() == 0


def tell(message: str) -> None:
    """Prints a line to standard error. A closed pipe or a full disk does not stop a run."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        # Later output would fail too, and the interpreter would try again at its exit.
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def output_of(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs ``ibq-scale WORDS`` as a process. Its standard output is kept, its errors are shown."""
    command = [sys.executable, "-m", "ibq_scale", *words]
    return subprocess.run(command, stdout=subprocess.PIPE, check=False, encoding="utf-8", errors="replace")


def duration(seconds: float) -> str:
    """``3h05m``, ``12m30s`` or ``8s``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"


def gigabytes(size: float) -> str:
    """``3.08 GB``, or ``87.25 MB`` below 0.1 GB (10⁹ and 10⁶ bytes)."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def short(number: float, digits: int = 4) -> str:
    """So many digits and a prefix: ``16.38 k``, ``128.3 M``."""
    for unit, name in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.{digits}g}{name}"
    return f"{number:.{digits}g}"


def several(items: Sequence[str], most: int = 6) -> str:
    """A list in words, shortened."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, each column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
