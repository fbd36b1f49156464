"""Times the parts of a step, forward and backward, by marks on the device's own time line."""

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
    """Exclusive time by part: an inner part does not count for the outer one.

    On a GPU the marks are events in its stream, without synchronisation. Idle time counts for the current part.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[Any, str]] = []
        self._stack = [OTHER]

    def push(self, part: str) -> None:
        self._stack.append(part)
        self._mark()

    def pop(self) -> None:
        """Ends the part started last."""
        self._stack.pop()
        self._mark()

    def reset(self) -> None:
        """Clears all times and starts anew."""
        self._marks = []
        self._mark()

    def seconds(self) -> dict[str, float]:
        """Seconds by part since `reset`. Synchronises with the device."""
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
        """Counts the time in this context for `name`."""
        self.push(name)
        try:
            yield
        finally:
            self.pop()

    def timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return call(*args, **kwargs)

        return run

    def timed_both_ways(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """`call`, with its time and that of its backward pass counted for `part`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                (args, kwargs), entered = _through(_Entrance, self, part, (args, kwargs))
                out = call(*args, **kwargs)
                return _through(_Exit, self, part, out)[0] if entered else out

        return run


def _through(gate: type[torch.autograd.Function], clock: Clock, part: str, values: Any) -> tuple[Any, bool]:
    """Leads all tensors of `values` that need a gradient through one gate. Also returns whether there are any."""
    leaves, shape = tree_flatten(values)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    if not places or not torch.is_grad_enabled():
        return values, False
    for place, x in zip(places, gate.apply(clock, part, *(leaves[i] for i in places)), strict=True):
        leaves[place] = x
    return tree_unflatten(leaves, shape), True


class _Entrance(torch.autograd.Function):
    """The start of a part, and the end of its backward pass."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, part: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.clock = clock
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.clock.pop()
        return None, None, *grads


class _Exit(torch.autograd.Function):
    """The end of a part, and the start of its backward pass."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, part: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.clock, ctx.part = clock, part
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.clock.push(ctx.part)
        return None, None, *grads
