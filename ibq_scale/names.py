"""Checks names and hashes from manifests before they become paths.

Data sets, mirrors, models and run directories come from other people. A name with `..`, or a path as a hash, could
read, write or remove files outside of its folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

from ibq_scale.errors import UserError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DRIVE = re.compile(r"[A-Za-z]:")
# Limits of file systems: bytes of a part, and of a path.
MOST_PART, MOST_NAME = 255, 1024

# For pydantic's regular expressions, where $ is the end of the text, not of a line.
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def file_name(name: object) -> str:
    """`name`, if it is a relative, normal path with ``/``. ValueError otherwise."""
    if not isinstance(name, str):
        raise ValueError(f"{name!r:.100} is no file name")
    try:
        parts = [part.encode() for part in name.split("/")]
    except UnicodeEncodeError:
        parts = []
    if (
        not parts
        or any(part in (b"", b".", b"..") or len(part) > MOST_PART for part in parts)
        or len(name.encode()) > MOST_NAME
        or _DRIVE.match(name)
        or any(character == "\\" or not character.isprintable() for character in name)
    ):
        raise ValueError(f"{name!r:.100} is no relative file name")
    return name


FileName = Annotated[str, AfterValidator(file_name)]


def expand_home(path: str) -> Path:
    """Expands ``~`` where no shell did: in quotes, in YAML, after a ``=``. UserError without a known home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"'{path}': no home folder is known: write the path in full") from None


def is_text(name: str) -> bool:
    """Whether it can be written as UTF-8. Python represents other bytes in file names as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def is_sha256(value: object) -> bool:
    """Whether it has 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def is_inside(root: Path, name: str) -> bool:
    """Whether ROOT/NAME, with all links followed, is in `root`. The root may be a link."""
    try:
        return (root / name).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):
        # A circle of links.
        return False
