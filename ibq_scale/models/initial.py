"""Initial weights as pure functions of (seed, parameter's name, element), so that a rank makes just what it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements that are drawn from one generator, and that are in host memory at a time.
CHUNK = 2**20

Values = Callable[[str, int, int], Tensor]
"""(name, start, length) → those elements (length,) of the flattened parameter, on the CPU."""


class Normal(NamedTuple):
    """N(mean, std²) for each of `size` elements, but N(mean, first_std²) for the first `first` of them."""

    size: int
    std: float
    mean: float = 0.0
    first: int = 0
    first_std: float = 0.0

    def elements(self, key: str, start: int, length: int) -> Tensor:
        """Elements start … start + length − 1, fp32 (length,); `key` decides what is drawn."""
        out = torch.full((length,), self.mean)
        if self.std or self.first_std:
            std = torch.full((length,), self.std)
            std[: max(self.first - start, 0)] = self.first_std
            torch.addcmul(out, _standard_normal(key, self.size, start, length), std, out=out)
        return out


def drawn(recipe: dict[str, Normal], seed: int) -> Values:
    """`Values` of the parameters that a recipe names."""
    return lambda name, start, length: recipe[name].elements(f"{seed}/{name}", start, length)


@torch.no_grad()
def fill(flat: Tensor, values: Values, name: str, start: int = 0) -> None:
    """Writes the elements from `start` on of parameter `name` into `flat` (n,), of any device and dtype."""
    for offset in range(0, len(flat), CHUNK):
        part = flat[offset : offset + CHUNK]
        part.copy_(values(name, start + offset, len(part)))


def _standard_normal(key: str, size: int, start: int, length: int) -> Tensor:
    return torch.cat(list(_chunks(key, size, start, start + length)))


def _chunks(key: str, size: int, start: int, end: int) -> Iterator[Tensor]:
    for number in range(start // CHUNK, -(-end // CHUNK)):
        digest = hashlib.blake2b(f"{key}/{number}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        begin = number * CHUNK
        whole = torch.randn(min(CHUNK, size - begin), generator=generator)
        yield whole[max(start - begin, 0) : end - begin]
