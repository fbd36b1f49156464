"""Sources of pictures: a folder, webdataset tars or parquet. The form is decided by all files found.

A source is divided into units of work, in an order given by names alone. A unit can be read from any position, one
sample at a time. So memory holds only one sample, and a stopped run can resume.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from ibq_scale.data.index import ADOPTED
from ibq_scale.data.labels import Group
from ibq_scale.data.listing import ARCHIVES, PARQUET, TAR, WANTED, Listing, is_picture_name, list_files
from ibq_scale.data.manifest import NAME, load_manifest
from ibq_scale.data.parquet import open_parquet
from ibq_scale.data.pictures import SPLIT_NAMES, open_folder
from ibq_scale.data.samples import Source, Unit
from ibq_scale.data.tables import ENDINGS, find_table
from ibq_scale.data.tars import BY_FOLDER, NO_LABEL, Naming, TarSource
from ibq_scale.data.verify import load_index
from ibq_scale.errors import UserError


class Opened(NamedTuple):
    source: Source
    units: list[Unit]
    listing: Listing
    left_out: dict[str, Group]


def open_source(url: str, columns: Collection[str] = (), naming: Naming | None = None) -> Opened:
    """The source at a folder, file, glob or brace pattern, local or in S3. `columns`: those named by conditions.

    UserError if there is nothing, no picture, or several forms of sources.
    """
    listing = list_files(url)
    naming = naming or Naming()
    tars, parquet = listing.ending(TAR), listing.ending(PARQUET)
    archives = listing.ending(*ARCHIVES)
    pictures = {name: size for name, size in listing.files.items() if is_picture_name(name)}
    left_out = dict(listing.left_out)
    _refuse_several(listing, tars, parquet, pictures, archives)
    _refuse_splits(listing, tars)
    source: Source
    files = dict(listing.files)
    if tars:
        source, files = TarSource(listing.store, naming, classes=_names_of_prepared(listing, tars)), tars
        # img2dataset writes a parquet file without pictures beside each tar.
        _add(left_out, "parquet files beside tars", parquet)
    elif parquet:
        source, files = open_parquet(listing.store, parquet, columns, naming.label), parquet
    else:
        own = (None, NO_LABEL, BY_FOLDER)
        table = None if naming.label in own[1:] else find_table(listing, naming.label)
        source, more = open_folder(listing, naming.label, table)
        left_out |= more
        aside = {*archives, *(name for name in listing.ending(*ENDINGS) if "/" not in name)}
        files = {name: size for name, size in files.items() if name not in aside}
        _add(left_out, "archives", archives)
    units = source.units(files)
    if not units:
        if archives:
            raise UserError(f"{url} holds {', '.join(list(archives)[:3])}: unpack compressed archives first")
        raise UserError(f"{url} holds no pictures: {WANTED}")
    return Opened(source, units, listing, left_out)


def _names_of_prepared(listing: Listing, tars: Mapping[str, int]) -> tuple[str, ...]:
    """The classes' names from the manifest of a prepared set. Its tars have only numbers."""
    if NAME not in listing.files:
        return ()
    try:
        manifest = load_manifest(listing.store, "images")
        index = load_index(listing.store, manifest.shards[0])
    except (UserError, IndexError):
        return ()
    own = {shard.name for shard in manifest.shards} >= set(tars) and not index.plan.startswith(ADOPTED)
    return manifest.classes if own else ()


def _add(left_out: dict[str, Group], reason: str, names: Collection[str]) -> None:
    for name in names:
        left_out.setdefault(reason, Group()).add(name)


def _refuse_splits(listing: Listing, files: Collection[str]) -> None:
    """UserError for tars of several splits, e.g. training and validation: training on both is surely a mistake."""
    splits: dict[str, str] = {}
    for name in files:
        words = re.split(r"[^a-z]+", name.lower())
        split = next((kind for kind, called in SPLIT_NAMES.items() if called & set(words)), None)
        if split is not None:
            splits.setdefault(split, name)
    if len(splits) > 1:
        raise UserError(
            f"{listing.url} holds the splits {', '.join(splits)} ({', '.join(splits.values())}): name the files of "
            "one, by a folder or a 'pattern'"
        )


def _refuse_several(listing: Listing, *forms: Collection[str]) -> None:
    """UserError for several forms, e.g. tars beside class folders unpacked from them: the choice is the user's."""
    tars, parquet, pictures, archives = forms
    halves = [("tars", tars, "*.tar"), ("compressed archives", archives if tars else (), "")]
    halves += [("parquet files", () if tars else parquet, "*.parquet"), ("pictures", pictures, "*/*")]
    there = [(what, list(names), pattern) for what, names, pattern in halves if names]
    if len(there) < 2:
        return
    said = " and ".join(f"{len(names):,} {what} ({', '.join(names[:3])})" for what, names, _ in there)
    ways = " or ".join(f"'{listing.url}/{pattern}'" for _, _, pattern in there if pattern)
    raise UserError(f"{listing.url} holds {said}: say which, like {ways}, or move the others away")
