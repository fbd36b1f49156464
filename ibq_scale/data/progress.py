"""A line with the progress of a long job."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from ibq_scale.console import duration

TERMINAL_SECONDS, LOG_SECONDS = 0.2, 30.0


class Progress:
    """Prints images done, their rate, the share of bytes and the time left, often on a terminal, rarely in a log."""

    def __init__(self, what: str, total_bytes: int, out: TextIO | None = None) -> None:
        self._what = what
        self._total = max(total_bytes, 1)
        self._out = sys.stderr if out is None else out
        self._terminal = self._out.isatty()
        self._begin = self._shown = time.monotonic()
        self._images = self._worked = self._skipped = 0

    def show(self, images: int, worked: int, skipped: int) -> None:
        """Takes totals so far: images, bytes read, bytes done by an earlier run. Prints a line if one is due."""
        self._images, self._worked, self._skipped = images, worked, skipped
        now = time.monotonic()
        if now - self._shown >= (TERMINAL_SECONDS if self._terminal else LOG_SECONDS):
            self._shown = now
            self._print(now)

    def close(self) -> None:
        """Ends the line on a terminal."""
        if self._terminal:
            self._print(time.monotonic())
            print(file=self._out, flush=True)

    def _print(self, now: float) -> None:
        seconds = max(now - self._begin, 1e-9)
        share = min((self._worked + self._skipped) / self._total, 1.0)
        text = f"{self._what}: {self._images:,} images, {self._images / seconds:,.0f}/s, {share:.0%}"
        if self._worked and share < 1.0:
            text += f", {duration((self._total - self._worked - self._skipped) * seconds / self._worked)} left"
        # Clears the rest of a longer line.
        print(
            f"\r{text}\x1b[K" if self._terminal else text,
            end="" if self._terminal else "\n",
            file=self._out,
            flush=True,
        )
