"""A run's use of its GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ibq_scale.config.run import AnyRun
from ibq_scale.distributed.world import World
from ibq_scale.models.layout import compute_dtype
from ibq_scale.scaling.devices import known_peak
from ibq_scale.scaling.flops import training_flops


def sheet_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device by its data sheet. Known for bf16 on some GPUs, else None."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return known_peak(torch.cuda.get_device_name(device))


@dataclass(frozen=True)
class Utilization:
    """`flops`: for the training on one image. `peak`: FLOP/s in bf16 of all GPUs, by their data sheet."""

    flops: float
    peak: float

    @staticmethod
    def of(config: AnyRun, world: World) -> Utilization | None:
        """None without a known peak: on CPUs, in fp32, for a GPU outside of the table (`scaling.devices`)."""
        peak = sheet_peak(world.device, compute_dtype(config))
        return None if peak is None else Utilization(training_flops(config), peak * world.size)

    def mfu(self, images_per_s: float) -> float:
        """Model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B), in 0 … 1."""
        return self.flops * images_per_s / self.peak
