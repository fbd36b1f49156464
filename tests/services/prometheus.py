"""Debian's Prometheus: the server and its checker."""

from __future__ import annotations

import shutil

PROGRAMS = ("prometheus", "promtool")


def missing_packages() -> list[str]:
    """Debian packages to install before the programs can run."""
    return [] if all(shutil.which(program) for program in PROGRAMS) else ["prometheus"]
