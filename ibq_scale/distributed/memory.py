"""The memory use of this process."""

from __future__ import annotations

from pathlib import Path

import torch


def peak_bytes(device: torch.device) -> int:
    """Highest memory so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss: it survives exec, so it may be the parent's.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
