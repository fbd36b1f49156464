"""Bytes of live tensors on any device. On ``meta`` a step can be rehearsed without memory.

Every operator's outputs are tracked from allocation to release, as by an allocator. The count thus follows the training
code itself and not a formula. On ``meta`` four operators are replaced by their CUDA forms: attention without a T × T
matrix, dropout with a mask of one byte an element, RMS norms in one operator, and norms of images fused with SiLU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibq_scale.models import norm

_rms_norm = F.rms_norm
# torch's CUDA allocator rounds up to this size.
BLOCK = 512


def rounded(size: int) -> int:
    """Bytes taken by an allocation of `size` bytes."""
    return -(-size // BLOCK) * BLOCK


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' memory. Shared memory counts once."""
    return sum(rounded(s.nbytes()) for s in {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values())


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Current and peak bytes of tensors made inside. `known` tensors count from the start, `free` ones never."""

    def __init__(self, known: Sequence[Tensor] = (), free: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._seen: dict[int, Any] = {}
        for tensor in free:
            self._follow(tensor.untyped_storage(), 0)
        for tensor in known:
            self._follow(tensor.untyped_storage(), rounded(tensor.untyped_storage().nbytes()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._follow(storage, rounded(storage.nbytes()))
        return out

    def _follow(self, storage: torch.UntypedStorage, size: int) -> None:
        place = storage._cdata
        if place in self._seen:
            return

        def end(_: Any) -> None:
            del self._seen[place]
            self.alive -= size

        self._seen[place] = weakref.ref(storage, end)
        self.alive += size
        self.peak = max(self.peak, self.alive)


class NormShapes(TorchDispatchMode):
    """Group norms on ``meta`` in one operator. Enter it before `Allocations`.

    torch composes them of dozens of operators in Python there, in half of the time of a tokenizer's rehearsal.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        make = NORMS.get(func)
        return make(*args) if make is not None and args[0].is_meta else func(*args, **(kwargs or {}))


def _group_norm(x: Tensor, weight: Any, bias: Any, n: int, c: int, size: int, groups: int, eps: float) -> Any:
    return x.new_empty(x.shape), x.new_empty(n, groups), x.new_empty(n, groups)


def _group_norm_backward(
    grad: Tensor, x: Tensor, mean: Any, rstd: Any, weight: Any, n: int, c: int, size: int, groups: int, mask: Any
) -> Any:
    shapes = (x.shape, (c,), (c,))
    return tuple(x.new_empty(shape) if wanted else None for shape, wanted in zip(shapes, mask, strict=True))


NORMS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_group_norm.default: _group_norm,
    torch.ops.aten.native_group_norm_backward.default: _group_norm_backward,
}


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Attention, dropout and norms keep the same tensors for the backward pass as on CUDA. Results are meaningless.

    torch's functions are replaced, since a `TorchFunctionMode` is off within a backward pass, and checkpointed blocks
    run again there.
    """
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (F, "scaled_dot_product_attention", _attention),
        (F, "dropout", _dropout),
        (F, "rms_norm", rms_norm),
        (norm, "runs_fused", norm.fusible),
    ]
    with ExitStack() as stack:
        for module, name, form in replaced:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, form)
        yield


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


class _RMSNorm(torch.autograd.Function):
    """The input and fp32 roots are kept. On CPUs torch composes the norm of operators that keep five times as much."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_zeros((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(weight)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``F.rms_norm`` over the last dimension. Without a GPU it allocates as its CUDA kernel does, and returns zeros."""
    if input.is_cuda:
        return _rms_norm(input, list(normalized_shape), weight, eps)
    out: Tensor = _RMSNorm.apply(input, weight)
    return out


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """FlashAttention keeps queries, keys, values, the output and one fp32 number per query (arXiv 2307.08691)."""
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return out
