"""What a rank gives to a checkpoint: files that are named first, with all ranks, and written then, by each alone.

Apart, since a disk may be full on one rank only: whoever fails while others wait in a collective hangs them.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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


def write_all(files: Sequence[StateFile], folder: Path) -> None:
    """Writes the files under `folder`. Raises OSError."""
    for file in files:
        file.write(folder)
