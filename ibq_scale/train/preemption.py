"""Signals that ask a run to save and leave, agreed on by all ranks before any of them acts."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

# EX_TEMPFAIL of sysexits.h: "try again later". A batch script requeues on it and on nothing else.
REQUEUE_EXIT_CODE = 75
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers that a signal arrived. The trainer asks `agreed` once a step, on every rank."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked = False
        self._before = {s: signal.signal(s, self._note) for s in ASKING}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective: a rank that alone began a save would wait for ever."""
        flag = torch.tensor([int(self._asked)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
