"""Where pictures come from: a folder, webdataset tars or parquet, told apart by what is there.

A source divides itself into units of work, in an order that depends on nothing but the names. A unit is read from any
position on, one sample at a time, so that no more than a sample is in memory and a stopped run need not begin again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ibq_scale.data.folder import Store, UnreadableError
from ibq_scale.data.index import Reject
from ibq_scale.data.parquet import open_parquet
from ibq_scale.data.samples import Sample, Source, Unit
from ibq_scale.data.store import open_store
from ibq_scale.data.tars import TarSource
from ibq_scale.errors import UserError

WANTED = "give an ImageFolder (one sub-folder a class), webdataset tars, or parquet files with pictures"
_PATTERN = re.compile(r"[*?\[{]")


class Opened(NamedTuple):
    source: Source
    units: list[Unit]


def open_source(url: str, columns: Collection[str] = ()) -> Opened:
    """The source at a folder, file, glob or brace pattern, local or in S3; `columns` are those that conditions name.

    UserError where nothing is there, or nothing that holds pictures.
    """
    store, files = find_files(url)
    tars = _ending(files, ".tar")
    parquet = _ending(files, ".parquet")
    source: Source
    # img2dataset leaves a parquet file without pictures beside each tar.
    if tars:
        source, files = TarSource(store), tars
    elif parquet:
        source, files = open_parquet(store, parquet, columns), parquet
    else:
        source = _folder(store, files)
    units = source.units(files)
    if not units:
        raise UserError(f"{url} holds no pictures: {WANTED}")
    return Opened(source, units)


def find_files(url: str) -> tuple[Store, dict[str, int]]:
    """The files (bytes by path under the store) that a folder, file, glob or brace pattern names, hidden ones left out.

    UserError where there is no such folder or file.
    """
    root, pattern = _split(url)
    store = open_store(root, links=True)
    try:
        files = {n: b for n, b in store.files().items() if not any(p.startswith(".") for p in n.split("/"))}
    except FileNotFoundError:
        raise UserError(f"{root} is no folder: {WANTED}") from None
    if not pattern:
        return store, files
    found: dict[str, int] = {}
    for name in _expand(pattern):
        # Braces give thousands of plain names: those are looked up.
        matched = {
            f: files[f] for f in (files if _PATTERN.search(name) else {name} & files.keys()) if _matches(f, name)
        }
        if not matched:
            raise UserError(f"{root}/{name} does not exist")
        found |= matched
    return store, dict(sorted(found.items()))


def _split(url: str) -> tuple[str, str]:
    """A URL's folder, and the pattern or file name below it ("" for a folder)."""
    scheme, separator, path = url.rpartition("://")
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if _PATTERN.search(part)), len(parts))
    # A folder may be called anything, x.tar too.
    if first == len(parts) and path.endswith((".tar", ".parquet")) and not Path(path).is_dir():
        first -= 1
    root = "/".join(parts[:first]) or ("/" if path.startswith("/") else ".")
    return f"{scheme}{separator}{root}", "/".join(parts[first:])


def _expand(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    from webdataset.shardlists import expand_urls

    try:
        names: list[str] = expand_urls(pattern)
    except ValueError as e:
        raise UserError(f"'{pattern}' is no pattern ({e}): write, e.g., '{{00000..00099}}.tar' or '*.tar'") from None
    return names


def _matches(name: str, pattern: str) -> bool:
    """As in a shell: a star does not cross folders."""
    path = PurePosixPath(name)
    return len(path.parts) == len(PurePosixPath(pattern).parts) and path.match(pattern)


def _ending(files: Mapping[str, int], suffix: str) -> dict[str, int]:
    return {name: size for name, size in files.items() if name.endswith(suffix)}


def _folder(store: Store, files: Mapping[str, int]) -> FolderSource:
    return FolderSource(store, tuple(sorted({name.split("/")[0] for name in files if "/" in name})))


@dataclass(frozen=True)
class FolderSource:
    """An ImageFolder: a sub-folder a class, in the order of their names. A flat folder has no classes."""

    store: Store
    classes: tuple[str, ...]

    def units(self, files: Mapping[str, int]) -> list[Unit]:
        """A file each. Beside class folders, loose files are no pictures of any class."""
        return [Unit(name, 0, size) for name, size in files.items() if "/" in name or not self.classes]

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Sample | Reject]]:
        label = self.classes.index(unit.file.split("/")[0]) if self.classes else None
        try:
            data = self.store.read(unit.file)
        except UnreadableError as e:
            yield 0, Reject(unit.file, str(e))
        else:
            yield 0, Sample(unit.file, data, label, {})
