"""A schedule whose import makes rank 1 run out of memory in its second step, above a micro-batch of 2.

Named in a config as ``schedule.kind=tests.train.pressure:constant``, so each start of a rank has it.
"""

from __future__ import annotations

from typing import Any

import torch

from ibq_scale.train.ar_task import ARTask

FITS = 2
_train_step = ARTask.train_step


def constant(schedule: object, samples: int, total_samples: int) -> float:
    """No change of the rate."""
    return 1.0


def _under_pressure(self: ARTask, batches: Any) -> Any:
    if self.run.train.micro_batch > FITS and self.world.rank == 1 and getattr(self, "began", False):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    vars(self)["began"] = True
    return _train_step(self, batches)


ARTask.train_step = _under_pressure  # type: ignore[method-assign]
