"""What a rank gives to a checkpoint: files that are named first, with all ranks, and written then, by each alone.

Apart, since a disk may be full on one rank only: whoever fails while others wait in a collective hangs them.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


class TensorFile(NamedTuple):
    """A safetensors file at `path` in the checkpoint. The tensors are the live ones: they are written before a step."""

    path: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] | None = None

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        target = folder / self.path
        target.parent.mkdir(parents=True, exist_ok=True)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        try:
            save_file(plain, target, dict(self.metadata) if self.metadata else None)
        except SafetensorError as e:  # what it makes of a full disk
            raise OSError(errno.EIO, str(e)) from None

    @property
    def bytes(self) -> int:
        """About as many as the file has."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values()) + 1024


class TextFile(NamedTuple):
    """A text at `path` in the checkpoint."""

    path: str
    text: str

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        target = folder / self.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.text)

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


StateFile = TensorFile | TextFile


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file; readers see the old or the new one, never a part. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def copy_to_host(files: Sequence[StateFile]) -> list[StateFile]:
    """The files with copies of their tensors in host memory, pinned where they come from a GPU; waits for it once."""
    copies = [
        file._replace(tensors={name: _host_copy(tensor) for name, tensor in file.tensors.items()})
        if isinstance(file, TensorFile)
        else file
        for file in files
    ]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def _host_copy(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def write_all(files: Sequence[StateFile], folder: Path) -> None:
    """Writes the files under `folder`. Raises OSError."""
    for file in files:
        file.write(folder)
