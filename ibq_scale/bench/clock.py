"""Which part of a step the device is at, forward and backward, by marks on the device's own time line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

OTHER = "other"


class Clock:
    """Time by part, each exclusive: a part within another is not the other's.

    On a GPU the marks are events in its stream, so nothing waits; its idle time counts for the part it waits in.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[Any, str]] = []
        self._stack = [OTHER]

    def push(self, part: str) -> None:
        """`part` begins."""
        self._stack.append(part)
        self._mark()

    def pop(self) -> None:
        """The part that began last ends."""
        self._stack.pop()
        self._mark()

    def reset(self) -> None:
        """Forgets what was; time begins."""
        self._marks = []
        self._mark()

    def seconds(self) -> dict[str, float]:
        """Seconds by part since `reset`. Waits for the device."""
        self._mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        totals: dict[str, float] = {}
        for (begin, part), (end, _) in pairwise(self._marks):
            spent = begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
            totals[part] = totals.get(part, 0.0) + spent
        return totals

    def _mark(self) -> None:
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            now.record(torch.cuda.current_stream(self.device))
            self._marks.append((now, self._stack[-1]))
        else:
            self._marks.append((time.perf_counter(), self._stack[-1]))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Everything inside is `name`'s."""
        self.push(name)
        try:
            yield
        finally:
            self.pop()

    def timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """`call`, its time `part`'s."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return call(*args, **kwargs)

        return run

    def timed_both_ways(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """`call`, its time and that of its backward pass `part`'s."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                (args, kwargs), entered = _through(_Entrance, self, part, (args, kwargs))
                out = call(*args, **kwargs)
                return _through(_Exit, self, part, out)[0] if entered else out

        return run


def _through(gate: type[torch.autograd.Function], clock: Clock, part: str, values: Any) -> tuple[Any, bool]:
    """`values` with the tensors that have a gradient led through one gate, and whether there are such tensors."""
    leaves, shape = tree_flatten(values)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    if not places or not torch.is_grad_enabled():
        return values, False
    for place, x in zip(places, gate.apply(clock, part, *(leaves[i] for i in places)), strict=True):
        leaves[place] = x
    return tree_unflatten(leaves, shape), True


class _Entrance(torch.autograd.Function):
    """Where a part begins, and so where its backward pass ends."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, part: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.clock = clock
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.clock.pop()
        return None, None, *grads


class _Exit(torch.autograd.Function):
    """Where a part ends, and so where its backward pass begins."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, part: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.clock, ctx.part = clock, part
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.clock.push(ctx.part)
        return None, None, *grads
