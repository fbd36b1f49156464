"""webdataset tars as others write them: members of one key, up to the first dot, are a sample.

The picture is the member ``jpg``, ``jpeg``, ``png`` or ``webp``, else one that ends so (``jpeg.jpg``, ``image.png``);
the label is ``cls``, else ``label`` or ``cls`` of ``json``, whose values are the columns. Captions stay unread.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ibq_scale.data.folder import Store, UnreadableError
from ibq_scale.data.index import Reject
from ibq_scale.data.ranges import RangeReader
from ibq_scale.data.samples import Sample, Unit
from ibq_scale.documents import parse_json
from ibq_scale.errors import UserError
from ibq_scale.names import is_text

PICTURES = ("jpg", "jpeg", "png", "webp")
LABELS = ("label", "cls")
# Of what is read of a sample, into memory and whole.
MOST_BYTES = 256 << 20
# As webdataset splits a name.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


@dataclass(frozen=True)
class Place:
    """Where a member's bytes are in its tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class TarSample:
    """One key of a tar and its members by extension (lower case), in their order."""

    key: str
    start: int
    """Where its first header is."""
    members: Mapping[str, Place]

    @property
    def picture(self) -> Place | None:
        """The member that holds the picture."""
        for extension in PICTURES:
            if extension in self.members:
                return self.members[extension]
        return next((p for name, p in self.members.items() if name.rpartition(".")[2] in PICTURES), None)


class CutTarError(Exception):
    """A tar that does not end as one."""


def tar_samples(reader: RangeReader, start: int = 0) -> Iterator[TarSample]:
    """The samples of a tar from the header at byte `start` on.

    CutTarError, after the whole ones, where the tar breaks off: readers of tars take most breaks for its end.
    """
    reader.seek(start)
    sample: TarSample | None = None
    try:
        # ":" and not "|": positions must be the file's own.
        with tarfile.open(fileobj=reader, mode="r:") as tar:
            while (info := tar.next()) is not None:
                # tarfile keeps every member it has seen.
                tar.members.clear()  # type: ignore[attr-defined]
                name = _NAME.fullmatch(info.name)
                if name is None or not info.isreg():
                    continue
                if sample is None or sample.key != name[1]:
                    if sample is not None:
                        yield sample
                    sample = TarSample(name[1], info.offset, {})
                if not 0 <= info.size <= reader.size - info.offset_data:
                    raise CutTarError(f"breaks off in {info.name}")
                place = Place(info.offset_data, info.size)
                sample = TarSample(sample.key, sample.start, {**sample.members, name[2].lower(): place})
            end = tar.offset
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OSError, ArithmeticError, LookupError) as e:
        # tarfile's own words for headers with odd numbers are any of these.
        raise CutTarError(f"is no whole tar ({e})") from None
    if reader.read_at(end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        # The last sample may lack its label.
        raise CutTarError(f"breaks off at byte {end}: there is no end-of-archive mark")
    if sample is not None:
        yield sample


@dataclass(frozen=True)
class TarSource:
    """Tars, each a unit; positions are offsets of headers."""

    store: Store
    classes: tuple[str, ...] = ()

    def units(self, files: Mapping[str, int]) -> list[Unit]:
        return [Unit(name, 0, size) for name, size in files.items()]

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Sample | Reject]]:
        reader = RangeReader(self.store, unit.file, unit.bytes)
        position = start
        try:
            for sample in tar_samples(reader, start):
                yield sample.start, read_sample(reader, sample, unit.file)
                position = sample.start
        except (CutTarError, UnreadableError) as e:
            yield position + 1, Reject(unit.file, str(e))


def read_sample(reader: RangeReader, sample: TarSample, file: str) -> Sample | Reject:
    """The sample with its picture's bytes, named FILE/KEY; a Reject where it holds no picture."""
    name = f"{file}/{sample.key}"
    if not is_text(name):
        return Reject(name.encode("utf-8", "backslashreplace").decode(), "its name is no UTF-8")
    picture = sample.picture
    if picture is None:
        return Reject(name, f"no picture among its members ({', '.join(sample.members)})")
    read = [picture, *(sample.members[extension] for extension in ("json", "cls") if extension in sample.members)]
    if max(place.size for place in read) > MOST_BYTES:
        return Reject(name, f"its picture, json or cls is larger than {MOST_BYTES >> 20} MiB")

    def member(extension: str) -> bytes:
        place = sample.members.get(extension)
        return b"" if place is None else reader.read_at(place.offset, place.size)

    # In the order of the file, mostly, so that blocks are read once.
    data = reader.read_at(picture.offset, picture.size)
    columns = _json(member("json"))
    return Sample(name, data, _label(member("cls"), columns), columns)


def _json(data: bytes) -> Mapping[str, Any]:
    try:
        values = parse_json(data)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _label(cls: bytes, columns: Mapping[str, Any]) -> int | None:
    try:
        return int(cls)
    except ValueError:
        pass
    found = next((columns[name] for name in LABELS if name in columns), None)
    return found if isinstance(found, int) and not isinstance(found, bool) else None
