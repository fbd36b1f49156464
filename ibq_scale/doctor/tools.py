"""The subject of all checks, and calls of command-line tools."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

# For a tool without computation. nvidia-smi on a woken node is the slowest.
TOOL_SECONDS = 10.0
NO_TOOL = 127


@dataclass(frozen=True)
class Subject:
    """The subject besides the machine. None: left out (`data`), or the default."""

    data: str | None = None
    run_dir: str | None = None
    ranks: int | None = None


def ask(*words: str, seconds: float = TOOL_SECONDS) -> tuple[int, str]:
    """A tool's exit code and output, standard error after standard output.

    As in a shell, code 124 after a time-out, and `NO_TOOL` without the tool.
    """
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds)
    except FileNotFoundError:
        return NO_TOOL, ""
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {seconds:.0f} s"
    return done.returncode, "\n".join(text.strip() for text in (done.stdout, done.stderr) if text.strip())


def first(text: str) -> str:
    """The first line with text."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
