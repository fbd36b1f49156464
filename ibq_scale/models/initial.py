"""Initial weights as pure functions of (seed, parameter's name, element). A rank draws only its own elements.

`Uninitialized` skips initialisation for weights from elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Elements drawn from one generator, and in host memory at a time.
CHUNK = 2**20

Values = Callable[[str, int, int], Tensor]
"""(name, start, length) → those elements (length,) of the flattened parameter, on the CPU."""


class Normal(NamedTuple):
    """N(mean, std²) for each of `size` elements, and N(mean, first_std²) for the first `first` of them."""

    size: int
    std: float
    mean: float = 0.0
    first: int = 0
    first_std: float = 0.0

    def elements(self, key: str, start: int, length: int) -> Tensor:
        """Elements start … start + length − 1, fp32 (length,). `key` seeds the generators."""
        if not (self.std or self.first_std):
            return torch.full((length,), self.mean)
        parts = list(_chunks(key, self.size, start, start + length))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        first = max(self.first - start, 0)
        out[:first] *= self.first_std
        out[first:] *= self.std
        return out.add_(self.mean) if self.mean else out


def drawn(recipe: dict[str, Normal], seed: int) -> Values:
    """`Values` of the parameters in a recipe."""
    return lambda name, start, length: recipe[name].elements(f"{seed}/{name}", start, length)


def generator_of(text: str) -> torch.Generator:
    """A CPU generator seeded by a hash of the text."""
    digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@torch.no_grad()
def fill(flat: Tensor, values: Values, name: str, start: int = 0) -> None:
    """Writes the elements of parameter `name` from `start` on into `flat` (n,), on any device and in any dtype."""
    for offset in range(0, len(flat), CHUNK):
        part = flat[offset : offset + CHUNK]
        part.copy_(values(name, start + offset, len(part)))


def _chunks(key: str, size: int, start: int, end: int) -> Iterator[Tensor]:
    """Elements start … end − 1 of N(0, 1), each chunk by a generator of its own."""
    for number in range(start // CHUNK, -(-end // CHUNK)):
        begin = number * CHUNK
        whole = torch.randn(min(CHUNK, size - begin), generator=generator_of(f"{key}/{number}"))
        yield whole[max(start - begin, 0) : end - begin]


class Uninitialized(TorchFunctionMode):
    """Within this context modules skip ``torch.nn.init``, for weights to be filled afterwards or without memory.

    Random numbers for VGG's 138 million weights take seconds.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given.get("tensor", args[0] if args else None)
        return func(*args, **given)
