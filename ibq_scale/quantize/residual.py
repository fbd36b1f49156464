"""Several quantizers as one: on the residual of the ones before, on several scales, or on groups of dimensions.

Residual: SoundStream (arXiv 2107.03312). Scales: VAR (arXiv 2404.02905), algorithm 1. Groups: product quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq_scale.errors import UserError
from ibq_scale.quantize.modules import QuantizerOutput

_UP = {1: "linear", 2: "bicubic", 3: "trilinear"}
_MEANS = ("usage", "perplexity", "sample_entropy", "batch_entropy")


class _Several(nn.Module):
    """Quantizers in order. A module is one for all, as VAR shares its codebook. A class or function makes each."""

    def __init__(self, quantizer: nn.Module | Callable[..., nn.Module], count: int, name: str, arguments: Any) -> None:
        super().__init__()
        if count < 1:
            raise UserError(f"{type(self).__name__} needs at least one of its {name}, got {count}")
        if isinstance(quantizer, nn.Module):
            if arguments:
                raise UserError(f"{type(self).__name__} has a quantizer already: {', '.join(arguments)} have no effect")
            made = [quantizer]
        else:
            made = [quantizer(**arguments) for _ in range(count)]
        self.count = count
        self.quantizers = nn.ModuleList(made)

    def __getitem__(self, number: int) -> Any:
        """The quantizer of a level or group."""
        return self.quantizers[number % len(self.quantizers)]

    @property
    def channel_first(self) -> bool:
        return bool(self[0].channel_first)

    @property
    def codes(self) -> int:
        """Of one level or group."""
        return int(self[0].codes)

    @property
    def is_straight_through(self) -> bool:
        return bool(self[0].is_straight_through)

    def _axis(self) -> int:
        return 1 if self.channel_first else -1

    def _together(self, quantized: Tensor, indices: Any, outs: list[QuantizerOutput]) -> QuantizerOutput:
        """The loss and the statistics are means over the levels or groups, so weights do not depend on their number."""
        parts = {name: torch.stack([out.parts[name] for out in outs]).mean() for name in outs[0].parts}
        means = {name: torch.stack([getattr(out, name) for out in outs]).mean() for name in _MEANS}
        loss = torch.stack([out.loss for out in outs]).mean()
        return QuantizerOutput(quantized, indices, loss, parts, **means, levels=tuple(outs))


class ResidualQuantizer(_Several):
    """Each level quantizes what the levels before left over. `quantizer`: as in `_Several`.

    `ResidualQuantizer(IBQ, 4, dim=64, codes=1024)` has four codebooks, `ResidualQuantizer(IBQ(64, 1024), 4)` one for
    all. Indices have a last axis of levels. With `sizes`, one a level and the last that of the input, levels work on
    scales as in VAR: the residual is averaged down to the level's size, and its codes are interpolated up. Input is
    then (B, dim, …) of as many axes as a size has, and indices are a tuple, (B, …) each of its level's size.

    The encoder's gradient of `quantized`: with a straight-through quantizer its own, else the sum over levels.
    """

    def __init__(
        self,
        quantizer: nn.Module | Callable[..., nn.Module],
        levels: int | None = None,
        *,
        sizes: Sequence[int | Sequence[int]] | None = None,
        **arguments: Any,
    ) -> None:
        if sizes is not None and levels not in (None, len(sizes)):
            raise UserError(f"ResidualQuantizer has {levels} levels and {len(sizes)} sizes: give one of both")
        if sizes is None and levels is None:
            raise UserError("ResidualQuantizer needs its number of levels, or sizes for several scales")
        super().__init__(quantizer, len(sizes) if sizes is not None else levels or 0, "levels", arguments)
        self.sizes = None if sizes is None else tuple(s if isinstance(s, int) else tuple(s) for s in sizes)

    @property
    def dim(self) -> int:
        return int(self[0].dim)

    def forward(self, z: Tensor, mask: Tensor | None = None, levels: int | None = None) -> QuantizerOutput:
        """Quantizes z. `levels`: only the first ones. `mask`: as in `Quantizer.forward`, not with sizes."""
        side = self._side(z, mask)
        # Half precision would lose what deep levels correct.
        residual = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        codes = torch.zeros_like(residual)
        outs: list[QuantizerOutput] = []
        for level in range(self._used(levels)):
            out = self[level](self._down(residual, level), mask)
            made = self._up(out.quantized, side)
            residual = residual - made.detach()
            codes = codes + made
            outs.append(out)
        if self.is_straight_through:
            # Masked tokens get no gradient.
            real = z if mask is None else z * mask.unsqueeze(self._axis()).to(z.dtype)
            codes = _StraightThrough.apply(real, codes.to(z.dtype))
        return self._together(codes.to(z.dtype), self._joined([out.indices for out in outs]), outs)

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Any:
        """The indices alone: exact, as `Quantizer.encode`."""
        side = self._side(z, mask)
        residual = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        indices = []
        for level in range(self._used(levels)):
            indices.append(self[level].encode(self._down(residual, level), mask))
            residual = residual - self._up(self[level].decode(indices[-1]), side)
        return self._joined(indices)

    @torch.no_grad()
    def decode(self, indices: Any) -> Tensor:
        """The sum of the levels' codes, from all indices or those of the first levels only."""
        return self.decode_levels(indices)[-1]

    @torch.no_grad()
    def decode_levels(self, indices: Any) -> list[Tensor]:
        """What each number of levels decodes to, at full size: VAR's transformer reads these, sized down, as input."""
        split = list(indices) if self.sizes is not None else list(indices.unbind(-1))
        if not 1 <= len(split) <= self.count:
            raise UserError(f"ResidualQuantizer decodes indices of 1 to {self.count} levels, got {len(split)}")
        side = None
        if self.sizes is not None:
            side = _shape(self.sizes[-1], split[0].dim() - 1)
        sums: list[Tensor] = []
        for level, level_indices in enumerate(split):
            codes = self._up(self[level].decode(level_indices), side)
            sums.append(codes if not sums else sums[-1] + codes)
        return sums

    def _used(self, levels: int | None) -> int:
        if levels is not None and not 1 <= levels <= self.count:
            raise UserError(f"ResidualQuantizer has 1 to {self.count} levels to use, got {levels}")
        return self.count if levels is None else levels

    def _joined(self, indices: list[Any]) -> Any:
        return tuple(indices) if self.sizes is not None else torch.stack(indices, dim=-1)

    def _side(self, z: Tensor, mask: Tensor | None) -> tuple[int, ...] | None:
        """The full size with scales. UserError where the input is not of it."""
        if self.sizes is None:
            return None
        if mask is not None:
            raise UserError("ResidualQuantizer takes no mask with sizes: a coarse token would mix real and masked ones")
        found = tuple(z.shape[2:] if self.channel_first else z.shape[1:-1])
        wanted = _shape(self.sizes[-1], len(found))
        if len(found) not in _UP or found != wanted:
            raise UserError(f"ResidualQuantizer's last size is {self.sizes[-1]}, got input {tuple(z.shape)}")
        return wanted

    def _down(self, x: Tensor, level: int) -> Tensor:
        if self.sizes is None:
            return x
        return self._resized(x, _shape(self.sizes[level], x.dim() - 2), "area")

    def _up(self, x: Tensor, side: tuple[int, ...] | None) -> Tensor:
        return x if side is None else self._resized(x, side, _UP[len(side)])

    def _resized(self, x: Tensor, side: tuple[int, ...], mode: str) -> Tensor:
        first = x if self.channel_first else x.movedim(-1, 1)
        if first.shape[2:] == side:
            return x
        made = F.interpolate(first, size=side, mode=mode)
        return made if self.channel_first else made.movedim(1, -1)


class ProductQuantizer(_Several):
    """Groups of dimensions, quantized apart: K codes in each make K^groups together. Input has groups · dim dimensions.

    `quantizer`: as in `_Several`. Indices have a last axis of groups.
    """

    def __init__(self, quantizer: nn.Module | Callable[..., nn.Module], groups: int, **arguments: Any) -> None:
        super().__init__(quantizer, groups, "groups", arguments)

    @property
    def dim(self) -> int:
        return int(self[0].dim) * self.count

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes z, with a mask as in `Quantizer.forward`."""
        outs = [self[group](part, mask) for group, part in enumerate(self._parts(z))]
        quantized = torch.cat([out.quantized for out in outs], dim=self._axis())
        return self._together(quantized, torch.stack([out.indices for out in outs], dim=-1), outs)

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The indices alone: exact, as `Quantizer.encode`."""
        return torch.stack([self[group].encode(part, mask) for group, part in enumerate(self._parts(z))], dim=-1)

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """The codes of indices (…, groups)."""
        if indices.shape[-1] != self.count:
            raise UserError(f"ProductQuantizer decodes indices (…, {self.count}), got {tuple(indices.shape)}")
        return torch.cat([self[group].decode(part) for group, part in enumerate(indices.unbind(-1))], dim=self._axis())

    def _parts(self, z: Tensor) -> tuple[Tensor, ...]:
        axis = self._axis()
        if z.dim() <= max(axis, 0) or z.shape[axis] != self.dim:
            raise UserError(f"ProductQuantizer takes {self.dim} dimensions in axis {axis}, got {tuple(z.shape)}")
        return torch.chunk(z, self.count, dim=axis)


class _StraightThrough(torch.autograd.Function):
    """The codes, exactly. z gets their gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, codes: Tensor) -> Tensor:
        return codes.view_as(codes)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None


def _shape(size: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (size,) * axes if isinstance(size, int) else tuple(size)
