"""Names for the parts of a step in torch's traces."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function


def part(name: str) -> AbstractContextManager[Any]:
    """Names what runs within in a trace. It does nothing while none is recorded."""
    recorded = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    return record_function(name) if recorded else nullcontext()
