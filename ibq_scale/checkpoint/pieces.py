"""Named vectors on disk in pieces, each rank its own, read back by any other number of ranks in other pieces.

A folder holds one safetensors file a rank. A tensor NAME in it is the elements start … start + n − 1 of the vector
NAME, start being in the file's metadata; the files' pieces together are every vector exactly once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ibq_scale.checkpoint.files import TensorFile
from ibq_scale.errors import UserError

STARTS, FACTS = "starts", "facts"
# What an engine's weights are called among its vectors, before their own names.
WEIGHTS = "weights/"


class Piece(NamedTuple):
    """`values` (n,) are elements start … start + n − 1 of the vector `name`."""

    name: str
    start: int
    values: Tensor


class _Place(NamedTuple):
    start: int
    stop: int
    path: Path


def piece_file(folder: str, rank: int, pieces: Iterable[Piece], facts: Mapping[str, Any]) -> TensorFile:
    """This rank's file; a rank without pieces has its facts to write all the same."""
    pieces = list(pieces)
    tensors = {piece.name: piece.values for piece in pieces}
    assert len(tensors) == len(pieces), "a rank has one piece of a vector"
    starts = {piece.name: piece.start for piece in pieces}
    metadata = {STARTS: json.dumps(starts), FACTS: json.dumps(dict(facts))}
    return TensorFile(f"{folder}/rank-{rank:05d}.safetensors", tensors, metadata)


class PieceReader:
    """The vectors in a folder. `facts` are those of the first file; every rank writes the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}
        self._places: dict[str, list[_Place]] = {}
        self._files: dict[Path, Any] = {}
        files = sorted(folder.glob("rank-*.safetensors"))
        if not files:
            raise UserError(f"{folder} holds no state: the checkpoint is not whole")
        for path in files:
            self._index(path)

    def _index(self, path: Path) -> None:
        try:
            f: Any = safe_open(path, framework="pt")
            self._files[path] = f
            metadata = f.metadata() or {}
            self.facts = self.facts or json.loads(metadata[FACTS])
            for name, start in json.loads(metadata[STARTS]).items():
                (length,) = f.get_slice(name).get_shape()
                self._places.setdefault(name, []).append(_Place(start, start + length, path))
        except (OSError, SafetensorError, KeyError, ValueError) as e:
            raise UserError(f"{path} is damaged: {e}") from None

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fills `out` (n,) with elements from `start` on. UserError where some are missing."""
        stop, filled = start + len(out), 0
        for place in self._places.get(name, ()):
            first, last = max(start, place.start), min(stop, place.stop)
            if first < last:
                values = self._files[place.path].get_slice(name)[first - place.start : last - place.start]
                out[first - start : last - start] = values
                filled += last - first
        if filled != len(out):
            raise UserError(
                f"{self.folder}: of {name} {filled} elements of {len(out)} are there: it is another model's"
            )

    def tensors(self, kind: str = "") -> dict[str, Tensor]:
        """The vectors `kind`NAME whole and in shape, fp32, by NAME. UserError where the shapes were not kept."""
        if "shapes" not in self.facts:
            raise UserError(f"{self.folder} was written before the shapes were kept: train one step on, and take that")
        whole = {}
        for name, shape in self.facts["shapes"].items():
            flat = torch.empty(torch.Size(shape).numel())
            self.read(f"{kind}{name}", 0, flat)
            whole[name] = flat.view(shape)
        return whole

    def read_all(self, pieces: Iterable[Piece]) -> None:
        """Fills every piece's values in place."""
        with torch.no_grad():
            for piece in pieces:
                self.read(piece.name, piece.start, piece.values)
