"""Labels from a file beside the pictures: the Hub's ``metadata.csv`` or ``.jsonl``, a ``labels.csv``, a ``.tsv``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ibq_scale.data.filters import look_up
from ibq_scale.data.labels import Found, label_of_value
from ibq_scale.data.listing import Listing
from ibq_scale.documents import parse_json
from ibq_scale.errors import UserError

ENDINGS = (".csv", ".tsv", ".jsonl")
# Columns for the name of a row's picture, in order of preference.
FILE_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "image",
    "path",
    "filepath",
    "image_path",
    "image_id",
    "id",
    "name",
    "img",
)
# The Hub's own files. Their label column is used by default.
METADATA = ("metadata.csv", "metadata.jsonl")
MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Table:
    """A column of a file of rows. It is pickled to every process, so it holds no other columns."""

    file: str
    column: str
    labels: Mapping[str, Found]
    """By the picture's name as written in the row, with the table's folder as prefix."""

    @property
    def form(self) -> str:
        return f"column '{self.column}' of {self.file}"

    def label(self, file: str) -> Found:
        """A picture's label, by its path or its name, each with and without the ending."""
        name = file.rpartition("/")[2]
        keys = (file, name, file.rpartition(".")[0], name.rpartition(".")[0])
        return next((self.labels[key] for key in keys if key in self.labels), None)


def find_table(listing: Listing, column: str | None) -> Table | None:
    """The table with this column. By default it is the ``label`` of the Hub's ``metadata`` files.

    UserError if no file has the column, or several do.
    """
    found, seen = [], {}
    for file in listing.ending(*ENDINGS):
        if file.count("/") > 1 or (column is None and file.rpartition("/")[2].lower() not in METADATA):
            continue
        rows = _rows(listing, file)
        names = list(rows[0]) if rows else []
        key = next((c for f in FILE_COLUMNS for c in names if c.lower() == f), None)
        seen[file] = names
        wanted = column or "label"
        if key is None or not any(look_up(row, wanted) is not None for row in rows[:1000]):
            continue
        folder = file.rpartition("/")[0]
        prefix = f"{folder}/" if folder else ""
        labels: dict[str, Found] = {}
        for row in rows:
            name = str(row.get(key) or "").removeprefix("./")
            labels[prefix + name] = label_of_value(look_up(row, wanted))
        found.append(Table(file, wanted, labels))
    if column is None:
        return found[0] if len(found) == 1 else None
    if len(found) != 1:
        there = ", ".join(f"{file} ({', '.join(names[:6])})" for file, names in seen.items())
        raise UserError(
            f"{listing.url}: --label {column}: {len(found) or 'no'} file{'s' * (len(found) > 1)} with that column and "
            f"one of file names; there are {there or 'no .csv, .tsv or .jsonl files'}"
        )
    return found[0]


def _rows(listing: Listing, file: str) -> list[dict[str, Any]]:
    if listing.files[file] > MOST_BYTES:
        return []
    text = listing.store.read(file).decode("utf-8-sig", errors="replace")
    if file.lower().endswith(".jsonl"):
        try:
            rows = [parse_json(line) for line in text.splitlines() if line.strip()]
        except ValueError as e:
            raise UserError(f"{listing.url}/{file} is damaged: {e}") from None
        return [row for row in rows if isinstance(row, dict)]
    first = text.partition("\n")[0]
    mark = max(",;\t", key=first.count)
    return [dict(row) for row in csv.DictReader(io.StringIO(text), delimiter=mark)]
