"""Reads JSON and YAML from other people, bounded in size and depth, so no file can crash or block the program.

Data sets, models and run directories hold such files. Each level of nesting takes stack memory (for libyaml C's stack,
whose overflow ends the process), aliases in YAML multiply, and a pipe or a device never ends.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

# A manifest of 100,000 shards has 21 MB.
MOST_FILE_BYTES = 1 << 28
MOST_YAML_CHARACTERS = 1 << 20
MOST_LINE_BYTES = 1 << 20
MOST_DEPTH = 64
# Nodes of a YAML document, with aliases expanded.
MOST_NODES = 20_000


class DocumentError(ValueError):
    """A file without the expected content, with a short reason."""


def parse_json(data: bytes | str) -> Any:
    """The values of a JSON text. DocumentError if it is damaged or nested deeper than `MOST_DEPTH`."""
    try:
        values = json.loads(data)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as e:
        raise DocumentError(one_line(e)) from None
    level = [values]
    for _ in range(MOST_DEPTH + 1):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, (dict, list))]
        if not level:
            return values
    raise _too_deep()


def require_regular(path: Path) -> None:
    """DocumentError for a pipe, a folder or a device. For files opened by a library itself. OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DocumentError("it is no regular file")


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file without blocking on a pipe. OSError, DocumentError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DocumentError("it is no regular file")
    return os.fdopen(fd, "rb")


def read_text(path: Path) -> str:
    """A regular file of at most `MOST_FILE_BYTES`, as UTF-8. OSError, DocumentError."""
    with open_regular(path) as file:
        data = file.read(MOST_FILE_BYTES + 1)
    if len(data) > MOST_FILE_BYTES:
        raise DocumentError(f"it has more than {MOST_FILE_BYTES >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise DocumentError(f"it is no UTF-8: {e}") from None


def read_json(path: Path) -> Any:
    """The values of a JSON file. Raises as `read_text` and `parse_json`."""
    return parse_json(read_text(path))


def json_object(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON file. Empty if it is missing, damaged or no object."""
    try:
        found = read_json(path)
    except (OSError, DocumentError):
        return {}
    return found if isinstance(found, dict) else {}


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a log, one per line, with their text. Skips damaged lines. OSError, DocumentError."""
    with open_regular(path) as file:
        while line := file.readline(MOST_LINE_BYTES):
            begun = line
            while len(line) == MOST_LINE_BYTES and not line.endswith(b"\n"):
                # The rest of a line too long for our logs.
                begun, line = b"", file.readline(MOST_LINE_BYTES)
            try:
                text = begun.decode().rstrip("\n")
                values = parse_json(text)
            except ValueError:
                continue
            if isinstance(values, dict):
                yield text, values


def parse_yaml(text: str, *, texts: bool = False) -> Any:
    """Plain values, by libyaml if PyYAML has it (ten times as fast). DocumentError if it is damaged.

    `texts`: keep every value as text. YAML reads 24:00:00 as a number of seconds.
    """
    require_modest(text)
    try:
        return yaml.load(text, Loader=yaml.BaseLoader if texts else _loader())
    except Exception as e:  # a tagged value ("!!bool x") raises an error of any type
        raise DocumentError(one_line(e)) from None


def require_modest(text: str) -> None:
    """DocumentError for a YAML text nested too deep or grown too large by aliases. Needs no stack itself."""
    if len(text) > MOST_YAML_CHARACTERS:
        raise DocumentError(f"it has more than {MOST_YAML_CHARACTERS:,} characters")
    nodes = 0
    sizes: dict[str, int] = {}
    begun: list[tuple[str | None, int]] = []
    try:
        for event in yaml.parse(text, Loader=_loader()):
            if isinstance(event, yaml.AliasEvent):
                if any(anchor == event.anchor for anchor, _ in begun):
                    raise DocumentError(f"*{event.anchor:.50} refers to itself")
                nodes += sizes.get(event.anchor or "", 1)
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = begun.pop()
                if anchor is not None:
                    sizes[anchor] = nodes - before
            elif isinstance(event, yaml.CollectionStartEvent):
                begun.append((event.anchor, nodes))
                nodes += 1
            elif isinstance(event, yaml.ScalarEvent):
                nodes += 1
            if len(begun) > MOST_DEPTH:
                raise _too_deep()
            if nodes > MOST_NODES:
                raise DocumentError(f"it has more than {MOST_NODES:,} values")
    except yaml.YAMLError as e:
        raise DocumentError(one_line(e)) from None


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _too_deep() -> DocumentError:
    return DocumentError(f"it is nested deeper than {MOST_DEPTH} levels")


def one_line(error: Exception) -> str:
    """The error's text in one line. Some of yaml's errors have none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
