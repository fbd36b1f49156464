"""webdataset tars of any origin. Members with one key (their name up to the first dot) are a sample.

The picture is the member ``jpg``, ``jpeg``, ``png`` or ``webp``, else the only one with such an ending, else
``image.jpg`` or similar (`MAIN`). The label is one of `LABEL_MEMBERS`, else a key of ``json`` (its values are the
columns), else the key's class folder. Captions are not read. members.py parses the tars and detects broken ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ibq_scale.data.filters import look_up
from ibq_scale.data.folder import Store, UnreadableError
from ibq_scale.data.index import Reject
from ibq_scale.data.labels import Found, label_of_text, label_of_value, printable
from ibq_scale.data.listing import PICTURE_ENDINGS
from ibq_scale.data.members import CutTarError, MoreThanTarError, Place, members
from ibq_scale.data.ranges import RangeReader
from ibq_scale.data.samples import Look, Sample, Unit
from ibq_scale.documents import parse_json
from ibq_scale.names import is_text

PICTURES = ("jpg", "jpeg", "png", "webp", *(ending[1:] for ending in PICTURE_ENDINGS[2:]))
# Names of the main picture among several: image.jpg beside segmentation.png.
MAIN = ("image", "img", "input", "picture", "photo", "rgb", "jpg", "jpeg", "png", "webp")
LABEL_MEMBERS = ("cls", "cls.txt", "label", "label.txt", "index", "class", "class.txt", "label.cls")
# Label keys of json and label columns of parquet, in order of preference.
LABEL_KEYS = (
    "label", "cls", "class", "class_id", "class_idx", "class_index", "label_id", "category_id", "target", "class_name",
    "label_name", "category", "category_name",
)  # fmt: skip
NAME_KEYS = ("class_name", "label_name", "category_name", "class_label", "class", "category")
NO_LABEL, BY_FOLDER = "none", "folder"
# Limit for a sample's members, each read whole into memory.
MOST_BYTES = 256 << 20
# Enough for a header and a small member. Pictures are skipped.
LOOK_BLOCK = 16 << 10
# webdataset splits names at the first dot.
_TO_FIRST_DOT = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_TO_LAST_DOT = re.compile(r"((?:.*/|)[^./][^/]*)[.]([^/.]*)", re.DOTALL)


@dataclass(frozen=True)
class Naming:
    """The user's choices for the members of a tar."""

    stem: bool = False
    """Whether a key ends at the last dot of a name instead of the first."""
    picture: str | None = None
    """The picture's member."""
    label: str | None = None
    """A key of json, a member, `NO_LABEL` or `BY_FOLDER`."""
    root: str = ""
    """With `BY_FOLDER`: the common prefix of all keys, before the class."""

    def split(self, name: str) -> tuple[str, str] | None:
        match = (_TO_LAST_DOT if self.stem else _TO_FIRST_DOT).fullmatch(name)
        if match is None or any(part[:1] == "." and part.strip(".") for part in name.split("/")[:-1]):
            return None
        return match[1], match[2].lower()


@dataclass(frozen=True)
class TarSample:
    """One key of a tar and its members by extension (lower case), in the tar's order."""

    key: str
    start: int
    """Offset of its first header."""
    members: Mapping[str, Place]

    def pictures(self, wanted: str | None = None) -> tuple[str, ...]:
        """The picture members, the sample's own first. Empty without any, or if the choice is ambiguous."""
        found = tuple(name for name in self.members if name.rpartition(".")[2] in PICTURES)
        if wanted is not None:
            first = [name for name in self.members if name == wanted]
        else:
            # In the order of PICTURES.
            first = [name for name in PICTURES if name in self.members][:1] or (
                list(found) if len(found) == 1 else [name for name in found if name.partition(".")[0] in MAIN]
            )
        return (first[0], *(name for name in found if name != first[0])) if len(first) == 1 else ()

    def json(self) -> str | None:
        names = [name for name in self.members if name == "json" or name.endswith(".json")]
        return "json" if "json" in names else names[0] if len(names) == 1 else None

    def label_member(self, wanted: str | None) -> str | None:
        """The label's member."""
        names = LABEL_MEMBERS if wanted is None else (wanted,)
        found = next((name for name in names if name in self.members), None)
        ending = [name for name in self.members if name.endswith(".cls")] if wanted is None else []
        return found or (ending[0] if len(ending) == 1 else None)


def tar_samples(
    reader: RangeReader, start: int = 0, naming: Naming | None = None, *, scattered: bool = False
) -> Iterator[TarSample]:
    """The samples of a tar from the header at byte `start` on.

    `scattered`: members of one key may lie apart, so the whole tar is scanned before the first sample. CutTarError,
    after the whole samples, if the tar is cut off: most tar readers take a cut for the end.
    """
    naming = naming or Naming()
    if scattered:
        yield from (sample for sample in _gathered(reader, naming) if sample.start >= start)
        return
    sample: TarSample | None = None
    more: MoreThanTarError | None = None
    try:
        for member in members(reader, start):
            name = naming.split(member.name)
            if name is None:
                continue
            key, extension = name
            # A repeated name belongs to another sample, from a tar appended to this one.
            if sample is None or sample.key != key or extension in sample.members:
                if sample is not None:
                    yield sample
                sample = TarSample(key, member.start, {})
            sample = replace(sample, members={**sample.members, extension: member.place})
    except MoreThanTarError as e:
        more = e
    if sample is not None:
        yield sample
    if more is not None:
        raise more


def _gathered(reader: RangeReader, naming: Naming) -> Iterator[TarSample]:
    samples: list[tuple[str, int, dict[str, Place]]] = []
    newest: dict[str, dict[str, Place]] = {}
    cut: CutTarError | None = None
    try:
        for member in members(reader, 0):
            name = naming.split(member.name)
            if name is None:
                continue
            key, extension = name
            if extension in newest.setdefault(key, {}) or not newest[key]:
                newest[key] = {}
                samples.append((key, member.start, newest[key]))
            newest[key][extension] = member.place
    except CutTarError as e:
        cut = e
    yield from (TarSample(*sample) for sample in samples)
    if cut is not None:
        raise cut


@dataclass(frozen=True)
class TarSource:
    """Tars. A unit is a tar, a position the offset of a header."""

    store: Store
    naming: Naming = Naming()
    scattered: bool = False
    classes: tuple[str, ...] = ()

    form = "tars"

    def units(self, files: Mapping[str, int]) -> list[Unit]:
        return [Unit(name, 0, size) for name, size in files.items()]

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Sample | Reject]]:
        reader = RangeReader(self.store, unit.file, unit.bytes)
        position = start
        try:
            for sample in tar_samples(reader, start, self.naming, scattered=self.scattered):
                yield sample.start, read_sample(reader, sample, unit.file, self.naming)
                position = sample.start
        except (CutTarError, UnreadableError) as e:
            yield position + 1, Reject(unit.file, str(e))

    def look(self, unit: Unit, most: int | None = None) -> Look:
        reader = RangeReader(self.store, unit.file, unit.bytes, LOOK_BLOCK if self.store.local else None)
        look = Look()
        partial: dict[str, set[str]] = {}
        try:
            for sample in tar_samples(reader, 0, self.naming, scattered=self.scattered):
                if most is not None and look.samples == most:
                    break
                # The key was seen before, with other members only: both samples are incomplete.
                before = partial.get(sample.key)
                if before is not None and before.isdisjoint(sample.members):
                    look.scattered = True
                partial[sample.key] = (before or set()) | set(sample.members)
                self._look_at(look, reader, sample, unit.file)
        except (CutTarError, UnreadableError) as e:
            look.leave_out(f"a tar {e}", unit.file)
        return look

    def _look_at(self, look: Look, reader: RangeReader, sample: TarSample, file: str) -> None:
        name = f"{file}/{sample.key}"
        pictures = sample.pictures(self.naming.picture)
        if not pictures:
            several = [member for member in sample.members if member.rpartition(".")[2] in PICTURES]
            if len(several) > 1:
                look.leave_out("several pictures under one key", f"{name}: {', '.join(several[:3])}")
            else:
                look.leave_out("no picture among the members", name)
            return
        look.samples += 1
        for other in pictures[1:]:
            look.note("other pictures beside a sample's own", f"{name}.{other}")
        found, form, title = _label(reader, sample, self.naming, _columns(reader, sample))
        look.tally.add(name, found, form, title)
        if found is None and "/" in sample.key:
            look.folders[sample.key.rpartition("/")[0]] += 1


def by_folders(source: TarSource, folders: Mapping[str, int], files: int) -> TarSource | None:
    """The source with labels by the class folders in its tars. None if its folders are no classes."""
    paths = [folder.split("/") for folder in folders]
    common = 0
    while all(len(path) > common + 1 for path in paths) and len({path[common] for path in paths}) == 1:
        common += 1
    root = "".join(f"{part}/" for part in paths[0][:common])
    classes = {path[common] for path in paths}
    # Numbered folders, one per tar, are shards.
    shards = files > 1 and len(classes) >= files and all(name.isdecimal() for name in classes)
    if len(classes) < 2 or shards:
        return None
    return replace(source, naming=replace(source.naming, label=BY_FOLDER, root=root))


def read_sample(reader: RangeReader, sample: TarSample, file: str, naming: Naming | None = None) -> Sample | Reject:
    """The sample with its picture's bytes, named FILE/KEY. A Reject if it has no usable picture."""
    naming = naming or Naming()
    name = f"{file}/{sample.key}"
    if not is_text(name):
        return Reject(printable(name), "its name is no UTF-8")
    pictures = sample.pictures(naming.picture)
    if not pictures:
        several = [member for member in sample.members if member.rpartition(".")[2] in PICTURES]
        if len(several) > 1:
            return Reject(name, f"several pictures under one key ({', '.join(several[:3])}): --key stem or --picture")
        return Reject(name, f"no picture among its members ({', '.join(sample.members)})")
    picture = sample.members[pictures[0]]
    read = [picture, *(sample.members[m] for m in (sample.json(), sample.label_member(None)) if m is not None)]
    if max(place.size for place in read) > MOST_BYTES:
        return Reject(name, f"its picture, json or cls is larger than {MOST_BYTES >> 20} MiB")
    # Mostly in the file's order, to read each block once.
    data = reader.read_at(picture.offset, picture.size)
    columns = _columns(reader, sample)
    return Sample(name, data, _label(reader, sample, naming, columns)[0], columns)


def _columns(reader: RangeReader, sample: TarSample) -> Mapping[str, Any]:
    member = sample.json()
    place = None if member is None else sample.members[member]
    if place is None or place.size > MOST_BYTES:
        return {}
    try:
        values = parse_json(reader.read_at(place.offset, place.size))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _label(
    reader: RangeReader, sample: TarSample, naming: Naming, columns: Mapping[str, Any]
) -> tuple[Found, str, str | None]:
    """The label, its origin, and the class's name beside a number."""
    if naming.label == NO_LABEL:
        return None, "", None
    if naming.label == BY_FOLDER:
        folder, _, file = sample.key.removeprefix(naming.root).partition("/")
        return (folder if file else None), "folders in the tars", None
    member = sample.label_member(naming.label)
    if member is not None and sample.members[member].size <= MOST_BYTES:
        place = sample.members[member]
        text = reader.read_at(place.offset, place.size)
        return label_of_text(text), member, _title(columns, "")
    found, key = label_of_columns(columns, LABEL_KEYS if naming.label is None else (naming.label,))
    return found, f"json key '{key}'", _title(columns, key)


def label_of_columns(columns: Mapping[str, Any], keys: Sequence[str]) -> tuple[Found, str]:
    """The first label under these keys, and its key."""
    for key in keys:
        found = label_of_value(look_up(columns, key))
        if found is not None:
            return found, key
    return None, ""


def _title(columns: Mapping[str, Any], key: str) -> str | None:
    values = (columns.get(name) for name in NAME_KEYS if name != key)
    return next((value for value in values if isinstance(value, str) and value), None)
