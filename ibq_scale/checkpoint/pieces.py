"""Named vectors on disk, in pieces by rank. Any other number of ranks can read them in other pieces.

A folder holds one safetensors file per rank. Its tensor NAME holds elements start … start + n − 1 of the vector NAME,
with start in the file's metadata. The pieces of all files cover every vector exactly once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ibq_scale.checkpoint.files import TensorFile
from ibq_scale.documents import parse_json, require_regular
from ibq_scale.errors import UserError

STARTS, FACTS = "starts", "facts"
# Prefix of an engine's weights among its vectors.
WEIGHTS = "weights/"


class Piece(NamedTuple):
    """`values` (n,) are elements start … start + n − 1 of the vector `name`."""

    name: str
    start: int
    values: Tensor


class _Extent(NamedTuple):
    start: int
    stop: int
    path: Path


def piece_file(folder: str, rank: int, pieces: Iterable[Piece], facts: Mapping[str, Any]) -> TensorFile:
    """This rank's file. A rank without pieces still writes the facts."""
    pieces = list(pieces)
    tensors = {piece.name: piece.values for piece in pieces}
    assert len(tensors) == len(pieces), "a rank has one piece of a vector"
    starts = {piece.name: piece.start for piece in pieces}
    metadata = {STARTS: json.dumps(starts), FACTS: json.dumps(dict(facts))}
    return TensorFile(f"{folder}/rank-{rank:05d}.safetensors", tensors, metadata)


class PieceReader:
    """Reads the vectors in a folder. `facts` come from the first file, since every rank writes the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}
        self._extents: dict[str, list[_Extent]] = {}
        self._files: dict[Path, Any] = {}
        files = sorted(folder.glob("rank-*.safetensors"))
        if not files:
            raise UserError(f"{folder} holds no state: the checkpoint is not whole")
        for path in files:
            self._index(path)

    def _index(self, path: Path) -> None:
        try:
            require_regular(path)
            f: Any = safe_open(path, framework="pt")
            self._files[path] = f
            metadata = f.metadata() or {}
            self.facts = self.facts or _object(metadata[FACTS])
            for name, start in _object(metadata[STARTS]).items():
                (length,) = f.get_slice(name).get_shape()
                if type(start) is not int or start < 0:
                    raise ValueError(f"{name} starts at {start!r:.50}")
                self._extents.setdefault(name, []).append(_Extent(start, start + length, path))
        except (OSError, SafetensorError, KeyError, ValueError) as e:
            raise UserError(f"{path} is damaged: {e}") from None

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fills `out` (n,) with elements from `start` on. UserError if some are missing."""
        stop, filled = start + len(out), 0
        for extent in self._extents.get(name, ()):
            first, last = max(start, extent.start), min(stop, extent.stop)
            if first < last:
                values = self._files[extent.path].get_slice(name)[first - extent.start : last - extent.start]
                out[first - start : last - start] = values
                filled += last - first
        if filled != len(out):
            raise self._lacks(name, filled, len(out))

    def _lacks(self, name: str, there: int, wanted: int) -> UserError:
        return UserError(f"{self.folder}: {name} has {there} of {wanted} elements: the checkpoint is of another model")

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Full shapes by name without its kind. UserError if the checkpoint has none."""
        if "shapes" not in self.facts:
            raise UserError(
                f"{self.folder} is of an older version without shapes: train one more step, and use that checkpoint"
            )
        try:
            return {name: _shape(sides) for name, sides in self.facts["shapes"].items()}
        except (AttributeError, TypeError, ValueError) as e:
            raise UserError(f"{self.folder} is damaged: its shapes: {e}") from None

    def tensors(self, kind: str = "") -> dict[str, Tensor]:
        """The vectors `kind`NAME in their full shapes, fp32, by NAME. UserError as `shapes`."""
        whole = {}
        for name, shape in self.shapes.items():
            there = sum(extent.stop - extent.start for extent in self._extents.get(f"{kind}{name}", ()))
            if there != shape.numel():
                raise self._lacks(f"{kind}{name}", there, shape.numel())
            whole[name] = torch.empty(shape)
            self.read(f"{kind}{name}", 0, whole[name].view(-1))
        return whole

    def read_all(self, pieces: Iterable[Piece]) -> None:
        with torch.no_grad():
            for piece in pieces:
                self.read(piece.name, piece.start, piece.values)


def _object(text: str) -> dict[str, Any]:
    values = parse_json(text)
    if not isinstance(values, dict):
        raise ValueError("its metadata are no objects")
    return values


def _shape(sides: Sequence[int]) -> torch.Size:
    if any(type(side) is not int or not 0 <= side < 2**48 for side in sides) or math.prod(sides) >= 2**48:
        raise ValueError(f"{sides!r:.50} is none")
    return torch.Size(sides)
