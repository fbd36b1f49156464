"""Python's garbage collection, on all ranks after the same steps.

Left alone, each rank collects when its own count of objects says so. The others then wait for it in a collective: among
a thousand ranks, at almost every step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_STEPS = 100


@contextmanager
def collected_together() -> Iterator[None]:
    """Within, nothing is collected but by `collect_young` and `gc.collect`. What is there now stays."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect_young(step: int) -> None:
    """Collects what is new, after one step in `EVERY_STEPS`: milliseconds. What is older goes with the next save."""
    if step % EVERY_STEPS == 0:
        gc.collect(1)
