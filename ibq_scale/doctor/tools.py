"""What all checks are told, and how they ask a tool."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

# Of a tool that answers from its own tables: nvidia-smi of a node that just woke is the slowest.
TOOL_SECONDS = 10.0


@dataclass(frozen=True)
class Subject:
    """What is to be examined besides the machine. None: leave it out (`data`), or the default."""

    data: str | None = None
    run_dir: str | None = None
    ranks: int | None = None


def ask(*words: str, seconds: float = TOOL_SECONDS) -> tuple[int, str]:
    """A tool's exit code and what it printed, standard error after standard output; FileNotFoundError without it.

    Code 124 where it gave no answer in time.
    """
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {seconds:.0f} s"
    return done.returncode, "\n".join(text.strip() for text in (done.stdout, done.stderr) if text.strip())


def first(text: str) -> str:
    """The first line that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
