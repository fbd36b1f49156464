"""``manifest.json``: the content of a prepared data set. It is written last, so a half-written set cannot load."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from ibq_scale.config.base import Section
from ibq_scale.config.models import NonNegativeInt, Rows, Side
from ibq_scale.config.run import Aspects
from ibq_scale.data.folder import Store
from ibq_scale.data.geometry import Extent
from ibq_scale.data.pixel_rules import PixelRules
from ibq_scale.data.seen import Seen
from ibq_scale.data.shards import ShardInfo as ShardInfo
from ibq_scale.data.shards import ShardTable
from ibq_scale.data.store import open_store
from ibq_scale.documents import DocumentError, parse_json
from ibq_scale.errors import UserError

MANIFEST_VERSION = 1
NAME = "manifest.json"
Kind = Literal["images", "codes"]


def _is_none(value: object) -> bool:
    """Whether a key is left out. It is newer than the format, and hashes and stamps of earlier versions stay."""
    return value is None


class ConditionInfo(Section):
    """Vectors stored with codes: at most `tokens` of `width` each a sample, by the text encoder `encoder`.

    `captions`: sha256 (hex) of the encoded texts' source.
    """

    encoder: str
    tokens: Rows
    width: Side
    captions: str


class CodesInfo(Section):
    """Origin of codes: the hashes of the tokenizer and the image manifest. `crops`: crops encoded of each image."""

    codebook_size: Rows
    grid: tuple[Side, Side]
    crops: Rows = 1
    tokenizer: str
    source: str
    condition: ConditionInfo | None = Field(None, exclude_if=_is_none)


class AspectsInfo(Section):
    """Aspects (`config.aspects`), and the number of each shard's own. A shard has pictures of one aspect only."""

    names: Aspects
    of_shard: tuple[NonNegativeInt, ...]


class Manifest(Section):
    """`classes[label]` is a label's name.

    `pixels`: the rules to convert pictures. `seen`: a summary of the source. Sets of earlier versions have neither.
    `aspects`: of shards for training in buckets, or none.
    """

    version: int = MANIFEST_VERSION
    kind: Kind
    shards: ShardTable
    classes: tuple[str, ...]
    codes: CodesInfo | None = None
    pixels: PixelRules | None = Field(None, exclude_if=_is_none)
    seen: Seen | None = Field(None, exclude_if=_is_none)
    aspects: AspectsInfo | None = Field(None, exclude_if=_is_none)

    @model_validator(mode="after")
    def _each_shard_has_an_aspect(self) -> Manifest:
        found = self.aspects
        if found and (len(found.of_shard) != len(self.shards) or max(found.of_shard, default=0) >= len(found.names)):
            raise ValueError("aspects.of_shard has a number of aspects.names for every shard")
        return self

    @property
    def samples(self) -> int:
        return int(self.shards.samples.sum())

    @property
    def bytes(self) -> int:
        return int(self.shards.bytes.sum())

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(self.shards.samples.tolist())

    @property
    def extent(self) -> Extent:
        return Extent(len(self.shards), self.samples, self.bytes)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the content, independent of formatting and of `seen`."""
        values = self.model_dump(mode="json", exclude={"seen", "shards"}) | {"shards": []}
        before, name, after = json.dumps(values, sort_keys=True, separators=(",", ":")).rpartition('"shards":[')
        digest = hashlib.sha256(f"{before}{name}".encode())
        for number, shard in enumerate(self.shards.json()):
            digest.update(f"{',' * (number > 0)}{shard}".encode())
        digest.update(after.encode())
        return digest.hexdigest()


def load_manifest(source: Store | str, kind: Kind) -> Manifest:
    """Reads a data set's manifest. UserError if it is missing, of another version or kind, or damaged."""
    store = open_store(source) if isinstance(source, str) else source
    try:
        data = store.read(NAME)
    except FileNotFoundError:
        raise UserError(
            f"{store.url} has no {NAME}: is it the --to of a finished 'ibq-scale {_MAKER[kind]}'?"
        ) from None
    try:
        values = parse_json(data)
    except DocumentError as e:
        raise UserError(f"{store.url}/{NAME} is damaged: {e}") from None
    version = values.get("version") if isinstance(values, dict) else None
    if version != MANIFEST_VERSION:
        raise UserError(
            f"{store.url}/{NAME} has version {version}, this program reads {MANIFEST_VERSION}: "
            f"write the data set again with 'ibq-scale {_MAKER[kind]}'"
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as e:
        where = ".".join(map(str, e.errors()[0]["loc"]))
        raise UserError(f"{store.url}/{NAME} is damaged: {where}: {e.errors()[0]['msg']}") from None
    if not manifest.shards:
        raise UserError(f"{store.url}/{NAME} is damaged: it names no shard")
    if manifest.kind != kind:
        raise UserError(f"{store.url} holds {manifest.kind}, {kind} are needed here")
    return manifest


def save_manifest(store: Store, manifest: Manifest) -> None:
    """Writes the manifest. All files named in it must exist already."""
    store.write(NAME, (json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n").encode())


_MAKER = {"images": "prepare images", "codes": "tokenize"}
