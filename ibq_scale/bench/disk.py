"""Write rate of a disk: a plain file, written and flushed."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

CHUNK = 16 << 20


def write_rate(folder: Path, size: int) -> float:
    """Bytes per second of a plain file of this size, flushed to the disk. OSError if it cannot be written.

    The file is unlinked at once, so nothing of it remains in any case.
    """
    chunk = os.urandom(CHUNK)
    chunks = max(1, size // CHUNK)
    with tempfile.TemporaryFile(dir=folder) as f:
        begin = time.perf_counter()
        for _ in range(chunks):
            f.write(chunk)
        f.flush()
        os.fsync(f.fileno())
        return chunks * CHUNK / (time.perf_counter() - begin)
