"""ImageFolder: each sub-folder is a class. Folders without pictures are reported. Ambiguous layouts are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ibq_scale.data.folder import Store, UnreadableError
from ibq_scale.data.index import Reject
from ibq_scale.data.labels import FEW, Group
from ibq_scale.data.listing import Listing, is_picture_name
from ibq_scale.data.samples import Look, Sample, Unit
from ibq_scale.data.tables import Table
from ibq_scale.data.tars import NO_LABEL
from ibq_scale.errors import UserError

SPLIT_NAMES = {
    "train": {"train", "training"},
    "validation": {"val", "valid", "validation", "dev"},
    "test": {"test", "testing"},
}
SPLITS = {name for names in SPLIT_NAMES.values() for name in names} | {"eval"}
# Files per folder to examine for a picture's first bytes.
PROBED = 20
WITH_MAGIC = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF", b"P5", b"P6", b"\0\0\0\x0cjP")


@dataclass(frozen=True)
class FolderSource:
    """A folder, with a unit per file. The class is the first folder below the source, or comes from a table."""

    store: Store
    folders: tuple[str, ...]
    """The class folders. Empty for a flat folder."""
    table: Table | None = None
    labelled: bool = True
    classes: tuple[str, ...] = ()

    @property
    def form(self) -> str:
        return "class folders" if self.folders and self.table is None else "pictures"

    def units(self, files: Mapping[str, int]) -> list[Unit]:
        """One per file. If there are class folders, files outside them have no class and are left out."""
        if self.table is not None or not self.labelled:
            return [Unit(name, 0, size) for name, size in files.items() if is_picture_name(name)]
        kept = set(self.folders)
        return [Unit(name, 0, size) for name, size in files.items() if not kept or name.partition("/")[0] in kept]

    def look(self, unit: Unit, most: int | None = None) -> Look:
        return self.look_at([unit])

    def look_at(self, units: Sequence[Unit]) -> Look:
        """Looks at all units at once: a unit is one picture, labelled by its name."""
        look = Look(samples=len(units))
        for unit in units:
            if self.table is not None:
                look.tally.add(unit.file, self.table.label(unit.file), self.table.form)
            else:
                look.tally.add(unit.file, self._class(unit.file), "folder names")
        return look

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Sample | Reject]]:
        found = self.table.label(unit.file) if self.table is not None else self._class(unit.file)
        try:
            data = self.store.read(unit.file)
        except UnreadableError as e:
            yield 0, Reject(unit.file, str(e))
        else:
            yield 0, Sample(unit.file, data, found, {})

    def _class(self, file: str) -> str | None:
        folder, slash, _ = file.partition("/")
        return folder if self.labelled and self.folders and slash else None


def open_folder(listing: Listing, label: str | None, table: Table | None) -> tuple[FolderSource, dict[str, Group]]:
    """The source, and the files and folders left out of it, by reason.

    UserError if the folders are splits, lie one level too high, or many pictures lie beside class folders.
    """
    if label == NO_LABEL or table is not None:
        return FolderSource(listing.store, (), table, labelled=False), {}
    by_folder: dict[str, list[str]] = {}
    for name in listing.files:
        by_folder.setdefault(name.partition("/")[0] if "/" in name else "", []).append(name)
    loose = by_folder.pop("", [])
    classes = [folder for folder, names in sorted(by_folder.items()) if _holds_pictures(listing, names)]
    if not classes:
        return FolderSource(listing.store, ()), {}
    _refuse_splits(listing, {folder: by_folder[folder] for folder in classes})
    left_out: dict[str, Group] = {}
    for folder in sorted(set(by_folder) - set(classes)):
        left_out.setdefault("folders without a picture", Group()).add(f"{folder}/")
    left_out |= _loose(listing, loose, sum(len(by_folder[folder]) for folder in classes))
    return FolderSource(listing.store, tuple(classes)), left_out


def _holds_pictures(listing: Listing, names: list[str]) -> bool:
    """Judged by endings, and by the first bytes of a few files if the store is local or names have no ending."""
    filled = [name for name in names if listing.files[name]]
    named = [name for name in filled if is_picture_name(name)]
    if named and (not listing.store.local or not all(name.lower().endswith(WITH_MAGIC) for name in named[:PROBED])):
        return True
    bare = [name for name in filled if "." not in name.rpartition("/")[2]]
    return any(_begins_as_picture(listing, name) for name in (named or bare)[:PROBED])


def _begins_as_picture(listing: Listing, name: str) -> bool:
    try:
        return listing.store.read_range(name, 0, min(16, listing.files[name])).startswith(MAGIC)
    except UnreadableError:
        # Reported when the picture is read.
        return True


def _refuse_splits(listing: Listing, by_folder: Mapping[str, list[str]]) -> None:
    folders = list(by_folder)
    pictures = [name for names in by_folder.values() for name in names if is_picture_name(name)]
    deep = bool(pictures) and all(name.count("/") > 1 for name in pictures)
    if all(folder.lower() in SPLITS for folder in folders) and (deep or len(folders) > 1):
        raise UserError(
            f"{listing.url} holds the splits {', '.join(folders)} and no classes: give one of them, like "
            f"{listing.url}/{folders[0]}"
        )
    if len(folders) == 1 and deep:
        raise UserError(
            f"all pictures of {listing.url} lie in folders below {folders[0]}/: give {listing.url}/{folders[0]}, "
            "whose folders are the classes then; '--label none' takes all as one class"
        )


def _loose(listing: Listing, names: list[str], in_folders: int) -> dict[str, Group]:
    group = Group()
    for name in names:
        if is_picture_name(name):
            group.add(name)
    if group.count > FEW * (group.count + in_folders):
        raise UserError(
            f"{listing.url} holds {group} pictures outside of folders and {in_folders:,} files in class folders: "
            "move one half away, or '--label none' takes all as one class"
        )
    return {"pictures outside of the class folders": group} if group.count else {}
