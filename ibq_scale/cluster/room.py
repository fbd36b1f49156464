"""Free space of a folder's file system and of our quota, from the kernel."""

from __future__ import annotations

import ctypes
import errno
import tempfile
from pathlib import Path

from ibq_scale.errors import UserError


def nearest(path: Path) -> Path:
    """`path`, or its nearest existing parent."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def can_hold(folder: Path, size: int) -> bool | None:
    """Whether we can write `size` bytes there. They are reserved and released at once, so quotas count. None if the
    file system cannot reserve. UserError without write access.
    """
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    try:
        with tempfile.TemporaryFile(dir=folder) as f:
            if fallocate(f.fileno(), 0, 0, size) == 0:
                return True
            # posix_fallocate would write every block on a file system without support.
            return False if ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None
    except OSError as e:
        raise UserError(f"cannot write to {folder} ({e.strerror}): give another out=…") from None
