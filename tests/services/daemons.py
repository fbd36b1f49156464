"""What the services' starters share: running one by hand until Ctrl-C."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path


def run_by_hand(missing: Sequence[str], start: Callable[[Path], AbstractContextManager[Mapping[str, str]]]) -> None:
    """Starts a service in a folder of its own, prints the environment that leads there, and stops it at Ctrl-C."""
    if missing:
        raise SystemExit(f"apt-get install --no-install-recommends {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder, start(Path(folder)) as environment:
        print("export", *(f"{name}={value}" for name, value in environment.items()), flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass
