"""Time of a step from its FLOPs, memory traffic and communication, with stated efficiencies.

The slower of products and memory is the time of the passes (Williams et al., Commun. ACM 52, 2009):

    products    executed FLOPs, with recomputation, at `PRODUCTS` of the GPU's bf16 peak
    memory      each byte kept for the backward pass is written and read once in either direction (4 ×), weights are
                read once forward and twice backward for each micro-batch, at `MEMORY` of the sheet's bandwidth
    optimizer   this rank's share: weights and two moments in fp32 read and written, the gradient read, a weight written
    exchange    collectives (`communication`) on the links (`fabric`), hidden behind the backward pass (two thirds of
                the passes) if the DeepSpeed JSON has overlap_comm

Waiting for data, saves, and work other than products and memory are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ibq_scale.scaling.communication import Transfer
from ibq_scale.scaling.devices import Device
from ibq_scale.scaling.fabric import LINK_SHARE, Fabric
from ibq_scale.zero.memory import FP32, Zero

# Assumed shares of the data sheet.
PRODUCTS, MEMORY = 0.6, 0.8
BASIS = (
    f"ASSUMED: products at {100 * PRODUCTS:.0f} % of the peak, memory at {100 * MEMORY:.0f} % and links at "
    f"{100 * LINK_SHARE:.0f} % of the data sheet; not measured"
)
BACKWARD = 2 / 3
KEPT_PASSES, WEIGHT_PASSES = 4, 3
OPTIMIZER_BYTES = 2 * 3 * FP32 + FP32


@dataclass(frozen=True)
class GpuWork:
    """A GPU's work: executed FLOPs and bytes kept for the backward pass per image, and parameters."""

    flops: float
    kept: float
    parameters: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. `exposed`: the part of the exchange that nothing hides."""

    products: float
    memory: float
    optimizer: float
    exchange: float
    exposed: float

    @property
    def passes(self) -> float:
        return max(self.products, self.memory)

    @property
    def total(self) -> float:
        return self.passes + self.optimizer + self.exposed


def step_time(
    work: GpuWork,
    zero: Zero,
    device: Device,
    fabric: Fabric,
    transfers: Sequence[Transfer],
    images: int,
    *,
    overlap: bool = False,
) -> StepTime:
    """Time of a rank's step of `images` over all micro-batches."""
    bandwidth = MEMORY * device.bandwidth
    products = work.flops * images / (PRODUCTS * device.peak_bf16)
    moved = KEPT_PASSES * work.kept * images
    moved += WEIGHT_PASSES * zero.weight_bytes * work.parameters * zero.accumulation
    memory = moved / bandwidth
    share = work.parameters / (zero.world if zero.stage > 0 else 1)
    optimizer = (OPTIMIZER_BYTES + zero.weight_bytes) * share / bandwidth
    exchange = sum(fabric.seconds(transfer, zero.world) for transfer in transfers)
    hidden = BACKWARD * max(products, memory) if overlap else 0.0
    return StepTime(products, memory, optimizer, exchange, max(0.0, exchange - hidden))
