"""Python's garbage collection, on all ranks after the same steps.

By default each rank collects by its own count of objects, and the others wait for it in a collective. Among a thousand
ranks this happens at almost every step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_STEPS = 100


@contextmanager
def collected_together() -> Iterator[None]:
    """Within, only `collect_young` and `gc.collect` collect. Objects from before are frozen."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect_young(step: int) -> None:
    """Collects new objects after each `EVERY_STEPS` steps, in milliseconds. Older ones go with the next save."""
    if step % EVERY_STEPS == 0:
        gc.collect(1)
