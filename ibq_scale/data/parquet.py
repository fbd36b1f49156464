"""Hugging Face parquet: a column of encoded pictures, optionally one of labels. No other module uses pyarrow."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ibq_scale.data.folder import Store
from ibq_scale.data.index import Reject
from ibq_scale.data.labels import label_of_value
from ibq_scale.data.ranges import RangeReader
from ibq_scale.data.samples import Look, Sample, Unit
from ibq_scale.data.tars import BY_FOLDER, LABEL_KEYS, NO_LABEL
from ibq_scale.errors import UserError

PICTURES = ("image", "jpg", "jpeg", "png", "webp", "img")
# Rows decoded at once, a few megabytes of pictures.
ROWS = 16
FOOTERS_AT_ONCE = 16
_SPLIT = re.compile(r"(?:.*/)?([^/]+?)-\d+-of-\d+[^/]*\.parquet")


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files. A unit is a row group, a position a row in it."""

    store: Store
    picture: str
    label: str | None
    columns: tuple[str, ...]
    """Columns named by conditions and present in the files."""
    classes: tuple[str, ...]
    labelled: bool = True

    form = "parquet files"

    def units(self, files: Mapping[str, int]) -> list[Unit]:
        first = next(iter(files))

        def of_file(file: tuple[str, int]) -> list[Unit]:
            opened = _open(self.store, *file)
            schema = opened.schema_arrow
            if self.picture not in schema.names:
                raise UserError(f"{self.store.url}/{file[0]} has no column '{self.picture}', as the first file has")
            label = self.label if self.label in schema.names else _label_column(schema)
            if not self.labelled:
                label = None
            if label != self.label or _class_names(schema, label) != self.classes:
                raise UserError(
                    f"{self.store.url}: {first} has {_said(self.label, self.classes)}, {file[0]} has "
                    f"{_said(label, _class_names(schema, label))}: labels would not mean the same in both"
                )
            footer = opened.metadata
            return [Unit(file[0], i, _group_bytes(footer.row_group(i))) for i in range(footer.num_row_groups)]

        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            return [unit for units in pool.map(of_file, files.items()) for unit in units]

    def look(self, unit: Unit, most: int | None = None) -> Look:
        file = _open(self.store, unit.file, self.store.size(unit.file))
        look = Look()
        names = [self.label] if self.label else []
        group = file.metadata.row_group(unit.part)
        if not names:
            look.samples = group.num_rows
            look.tally.none.add(unit.file, group.num_rows)
            return look
        try:
            for values in file.read_row_group(unit.part, columns=names, use_threads=False).to_pylist():
                found = label_of_value(values[self.label])
                look.tally.add(f"{unit.file}/{unit.part}/{look.samples}", found, f"column '{self.label}'")
                look.samples += 1
        except (OSError, ValueError) as e:
            if isinstance(e, UserError) or getattr(e, "errno", None) is not None:
                raise
        return look

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Sample | Reject]]:
        file = _open(self.store, unit.file, self.store.size(unit.file))
        names = list(dict.fromkeys([self.picture, *([self.label] if self.label else []), *self.columns]))
        row = 0
        try:
            for batch in file.iter_batches(batch_size=ROWS, row_groups=[unit.part], columns=names, use_threads=False):
                if row + batch.num_rows > start:
                    for i, values in enumerate(batch.to_pylist(), row):
                        if i >= start:
                            yield i, self._sample(f"{unit.file}/{unit.part}/{i}", values)
                row += batch.num_rows
        except (OSError, ValueError) as e:
            # Arrow reports damaged pages with these types, without errno. System errors have one.
            if isinstance(e, UserError) or getattr(e, "errno", None) is not None:
                raise
            yield max(row, start), Reject(f"{unit.file}/{unit.part}", f"unreadable from row {row} on: {_first_line(e)}")

    def _sample(self, name: str, values: Mapping[str, Any]) -> Sample | Reject:
        picture = values[self.picture]
        data = picture.get("bytes") if isinstance(picture, dict) else picture
        if not data:
            return Reject(name, "no picture's bytes in its row")
        columns = {name: values[name] for name in self.columns}
        return Sample(name, data, label_of_value(values.get(self.label or "")), columns)


def open_parquet(
    store: Store, files: Mapping[str, int], columns: Collection[str], wanted_label: str | None = None
) -> ParquetSource:
    """The source with the columns of the first file. Labels come from `wanted_label`, if given.

    UserError without pyarrow, without a column of pictures or the wanted column of labels, or for several splits.
    """
    splits = sorted({match[1] for name in files if (match := _SPLIT.fullmatch(name))})
    if len(splits) > 1:
        raise UserError(f"{store.url} holds the splits {', '.join(splits)}: name one, like '{splits[0]}-*.parquet'")
    first = next(iter(files.items()))
    schema = _open(store, *first).schema_arrow
    picture = _picture_column(schema)
    if picture is None:
        raise UserError(
            f"{store.url}/{first[0]} has no column of pictures' bytes, only {', '.join(schema.names)}: "
            f"one must be binary, or a struct with 'bytes'"
        )
    label = _label_column(schema) if wanted_label is None else wanted_label
    labelled = wanted_label not in (NO_LABEL, BY_FOLDER)
    if not labelled:
        label = None
    elif label is not None and label not in schema.names:
        raise UserError(f"{store.url}/{first[0]} has no column '{label}', only {', '.join(schema.names)}")
    wanted = tuple(n for n in dict.fromkeys(c.partition(".")[0] for c in columns) if n in schema.names)
    # For a misspelt condition all columns are read: its error lists them.
    missing = {c.partition(".")[0] for c in columns} - set(wanted)
    if missing:
        wanted = tuple(n for n in schema.names if n != picture)
    return ParquetSource(store, picture, label, wanted, _class_names(schema, label), labelled)


def _open(store: Store, name: str, size: int) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install 'ibq-scale[parquet]'") from None
    try:
        # Read page by page, because a row group may be as large as the file.
        return parquet.ParquetFile(RangeReader(store, name, size), buffer_size=1 << 20, pre_buffer=False)
    except UserError:
        raise
    except (OSError, ValueError) as e:
        raise UserError(f"{store.url}/{name} is no whole parquet file: {_first_line(e)}") from None


def _picture_column(schema: Any) -> str | None:
    def holds_bytes(name: str) -> bool:
        kind = schema.field(name).type
        names = [field.name for field in kind] if str(kind).startswith("struct") else []
        kinds = str(kind.field("bytes").type) if "bytes" in names else str(kind)
        return kinds in ("binary", "large_binary")

    usable = [name for name in schema.names if holds_bytes(name)]
    named = [name for name in PICTURES if name in usable]
    return (named or usable or [None])[0]


def _label_column(schema: Any) -> str | None:
    kinds = ("int", "uint", "string", "large_string", "dictionary", "double", "float", "bool")
    return next((n for n in LABEL_KEYS if n in schema.names and str(schema.field(n).type).startswith(kinds)), None)


def _said(label: str | None, classes: tuple[str, ...]) -> str:
    if label is None:
        return "no labels"
    return f"labels '{label}'" + (f" of {len(classes)} names ({', '.join(classes[:3])}, …)" if classes else "")


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """The class names of a ClassLabel column, from the data set's metadata."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (TypeError, KeyError, ValueError):
        return ()


def _group_bytes(group: Any) -> int:
    """Bytes on disk. `total_byte_size` counts decompressed pages."""
    return sum(group.column(i).total_compressed_size for i in range(group.num_columns))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
