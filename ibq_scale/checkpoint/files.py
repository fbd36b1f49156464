"""A rank's files of a checkpoint. All ranks name them together, and each writes its own alone.

Naming and writing are separate because a disk may be full on one rank only. A failure within a collective would hang
the other ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 16 << 20
# The dtype names of https://github.com/huggingface/safetensors, the reader of these files.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8


class Written(NamedTuple):
    """A flushed file on disk."""

    bytes: int
    sha256: str


class TensorFile(NamedTuple):
    """A safetensors file at `path` in the checkpoint, of the live tensors, to be written before the next step."""

    path: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] | None = None

    def write(self, folder: Path) -> Written:
        """Writes the file under `folder`. Raises OSError.

        safetensors' `save_file` would copy all tensors, and its file would have to be read again for the hash.
        """
        # The widest dtype first, so that each tensor is aligned.
        names = sorted(self.tensors, key=lambda name: -self.tensors[name].element_size())
        return _write(folder / self.path, [self._header(names), *(_bytes(self.tensors[name]) for name in names)])

    def _header(self, names: Sequence[str]) -> bytes:
        entries: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        end = 0
        for name in names:
            tensor = self.tensors[name]
            begin, end = end, end + tensor.numel() * tensor.element_size()
            entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def bytes(self) -> int:
        """Approximate size of the file."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values()) + 1024


class TextFile(NamedTuple):
    """A text at `path` in the checkpoint."""

    path: str
    text: str

    def write(self, folder: Path) -> Written:
        """Writes the file under `folder`. Raises OSError."""
        return _write(folder / self.path, [self.text.encode()])

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


StateFile = TensorFile | TextFile


class HostCopies:
    """Copies of a rank's files in host memory, pinned for tensors on a GPU.

    The memory is kept between saves, since allocating it takes longer than the copy.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}

    def take(self, files: Sequence[StateFile]) -> list[StateFile]:
        """Copies the files' current tensors over the previous copies. Synchronises with the device once."""
        before, self._kept = self._kept, {}
        copies = [self._copy(file, before) if isinstance(file, TensorFile) else file for file in files]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _copy(self, file: TensorFile, before: Mapping[tuple[str, str], Tensor]) -> TensorFile:
        copies = {}
        for name, tensor in file.tensors.items():
            host = before.get((file.path, name))
            if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = self._kept[file.path, name] = host.copy_(tensor.detach(), non_blocking=True)
        return file._replace(tensors=copies)


def write_all(files: Sequence[StateFile], folder: Path) -> None:
    """Writes the files under `folder`. Raises OSError."""
    for file in files:
        file.write(folder)


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file atomically: readers see the old or the new one. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> Written:
    """Writes and flushes a file. Each chunk is hashed while the disk writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as f, ThreadPoolExecutor(1) as hashing:
        for part in parts:
            view = memoryview(part)
            for begin in range(0, len(view), CHUNK):
                chunk = view[begin : begin + CHUNK]
                hashed = hashing.submit(digest.update, chunk)
                f.write(chunk)
                hashed.result()
            size += len(view)
        f.flush()
        os.fsync(f.fileno())
    return Written(size, digest.hexdigest())
