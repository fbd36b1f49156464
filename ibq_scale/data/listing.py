"""Lists the files at a folder, file, glob or brace pattern. All readers of pictures share these rules.

Left out and reported: hidden files, files of systems and tools (`JUNK`), zero-byte folder markers in object storage,
and links to folders already read. An existing name is no pattern, even with brackets.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ibq_scale.data.folder import LocalStore, Store
from ibq_scale.data.labels import FEW, Group
from ibq_scale.data.local import walk
from ibq_scale.data.store import open_store
from ibq_scale.errors import UserError
from ibq_scale.names import expand_home, is_text

WANTED = "give an ImageFolder (one sub-folder a class), webdataset tars, or parquet files with pictures"
# Folders of other programs: Synology thumbnails, macOS archives, a disk's own, recycle bins.
JUNK = {"@eadir", "__macosx", "lost+found", "$recycle.bin", "#recycle", "system volume information", "__pycache__"}
JUNK_FILES = {"thumbs.db", "desktop.ini"}
PICTURE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif", ".tga",
)  # fmt: skip
TAR, PARQUET = ".tar", ".parquet"
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
NO_TEXT = "names that are no UTF-8"
_PATTERN = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class Listing:
    """Bytes by path under the store, sorted, and the files left out, by reason."""

    store: Store
    files: Mapping[str, int]
    left_out: dict[str, Group] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.store.url

    def ending(self, *endings: str) -> dict[str, int]:
        """The files with one of these endings, in upper or lower case."""
        return {name: size for name, size in self.files.items() if name.lower().endswith(endings)}


def is_picture_name(name: str) -> bool:
    return name.lower().endswith(PICTURE_ENDINGS)


def list_files(url: str) -> Listing:
    """Lists the files at `url`. UserError if there is no such folder or file."""
    root, pattern = _split(str(expand_home(url)) if url.startswith("~") else url)
    store = open_store(root, links=True)
    try:
        every, loops = walk(store.root) if isinstance(store, LocalStore) else (store.files(), [])
    except FileNotFoundError:
        raise UserError(f"{root} is no folder: {WANTED}") from None
    left_out: defaultdict[str, Group] = defaultdict(Group)
    for link in loops:
        left_out["links to folders that are read already"].add(link)
    files = {}
    for name, size in every.items():
        if reason := _unwanted(name):
            left_out[reason].add(name)
        else:
            files[name] = size
    unnamed = left_out.get(NO_TEXT, Group())
    if unnamed.count > FEW * len(every):
        raise UserError(f"{root}: {NO_TEXT}: {unnamed}: rename them (convmv does)")
    if pattern:
        files = _matching(root, files, pattern)
    return Listing(store, files, dict(left_out))


def _unwanted(name: str) -> str:
    """The reason to leave a file out, or ""."""
    if not is_text(name):
        return NO_TEXT
    parts = name.split("/")
    if not parts[-1]:
        return "markers of folders"
    if any(part.startswith(".") for part in parts):
        return "hidden files"
    if parts[-1].lower() in JUNK_FILES or any(part.lower() in JUNK for part in parts[:-1]):
        return "files of other programs"
    return ""


def _matching(root: str, files: Mapping[str, int], pattern: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in _expand(pattern):
        # Braces expand to thousands of plain names: a look-up is faster than a match.
        names = {name} if name in files else files if _PATTERN.search(name) else ()
        matched = {f: files[f] for f in names if f == name or _matches(f, name)}
        if not matched:
            raise UserError(f"{root}/{name} does not exist")
        found |= matched
    return dict(sorted(found.items()))


def _split(url: str) -> tuple[str, str]:
    """Splits a URL into its folder and the pattern or file name below it ("" for a folder)."""
    scheme, separator, path = url.rpartition("://")
    local = scheme in ("", "file")
    if local and Path(path).is_dir():
        return url, ""
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if _PATTERN.search(part)), len(parts))
    # Folders on the way may have brackets in their names.
    while local and first < len(parts) - 1 and Path("/".join(parts[: first + 1])).is_dir():
        first = next((i for i, part in enumerate(parts) if i > first and _PATTERN.search(part)), len(parts))
    is_file = path.lower().endswith((TAR, PARQUET, *ARCHIVES)) or (local and Path(path).is_file())
    if first == len(parts) and is_file:
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
    """Matches as a shell: a star does not cross folders."""
    path = PurePosixPath(name)
    return len(path.parts) == len(PurePosixPath(pattern).parts) and path.match(pattern)
