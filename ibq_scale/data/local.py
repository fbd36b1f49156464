"""Lists a folder of a file system, through links."""

from __future__ import annotations

import os
from pathlib import Path

from ibq_scale.errors import UserError


def walk(root: Path) -> tuple[dict[str, int], list[str]]:
    """The bytes of every file below, by path, sorted, and the left out links to folders already read.

    Each folder is read once, so loops of links end. FileNotFoundError if there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(root)
    files: dict[str, int] = {}
    again: list[str] = []
    seen: set[tuple[int, int]] = set()
    # Class folders are often links. Links are followed last, so a folder is kept and a link to it left out.
    links = [root]
    for link in links:
        for base, folders, names in os.walk(link, onerror=_unreadable):
            here = Path(base).stat()
            if (here.st_dev, here.st_ino) in seen:
                again.append(Path(base).relative_to(root).as_posix())
                folders.clear()
                continue
            seen.add((here.st_dev, here.st_ino))
            links += sorted(path for name in folders if (path := Path(base, name)).is_symlink())
            # `is_file` excludes dangling links and sockets.
            found = ((path, path.stat().st_size) for name in names if (path := Path(base, name)).is_file())
            files |= {path.relative_to(root).as_posix(): size for path, size in found}
    return dict(sorted(files.items())), sorted(again)


def _unreadable(error: OSError) -> None:
    # A folder deleted meanwhile has no files.
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"cannot read {error.filename}: {error.strerror}")
