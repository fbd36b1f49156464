"""DeepSpeed 0.19.8's memory for a network on each rank, by ZeRO stage: from its code, tested against its allocations.

A formula of 16 bytes a parameter misses two things. ZeRO-1 under bf16 with fp32 accumulation keeps *whole* fp32
gradients on every rank (`BF16_Optimizer`) beside the bf16 ones. fp32 runs on ZeRO-1 and 2 keep a second copy of this
rank's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ibq_scale.config.deepspeed import OFFLOADS, offloaded
from ibq_scale.zero.gradients import Reduction, reduction

Place = Literal["gpu", "host"]
FP32 = 4
# Bytes an element of the largest matrix in Muon's step: of the iterations (measured), and of each cut matrix with the
# rank's part of it, in bf16.
ITERATIONS, CUT = 7, 3
# DeepSpeed's own defaults, for keys absent from a JSON.
BUCKET, PERSISTENCE, LIVE = 500_000_000, 100_000, 1_000_000_000


@dataclass(frozen=True)
class Zero:
    """The part of a DeepSpeed JSON behind memory and traffic.

    `weight_bytes`: bytes of a parameter in the network's computations. `reduction`: the sum of gradients below ZeRO-3.
    """

    stage: int
    world: int
    weight_bytes: int
    accumulation: int
    offload_optimizer: bool = False
    offload_weights: bool = False
    reduce_bucket: int = BUCKET
    persistence_threshold: int = PERSISTENCE
    live_parameters: int = LIVE
    reduction: Reduction = "all-reduce"

    @staticmethod
    def of(config: dict[str, Any], *, world: int) -> Zero:
        """From a config completed by `deepspeed_config`."""
        zero = config.get("zero_optimization", {})
        return Zero(
            stage=zero.get("stage", 0),
            world=world,
            weight_bytes=2 if config["bf16"]["enabled"] else FP32,
            accumulation=config["gradient_accumulation_steps"],
            offload_optimizer=offloaded(zero, OFFLOADS[0]),
            offload_weights=offloaded(zero, OFFLOADS[1]),
            reduce_bucket=int(zero.get("reduce_bucket_size", BUCKET)),
            persistence_threshold=int(zero.get("stage3_param_persistence_threshold", PERSISTENCE)),
            live_parameters=int(zero.get("stage3_max_live_parameters", LIVE)),
            reduction=reduction(config),
        )


@dataclass(frozen=True)
class Shares:
    """Elements of a network's parameters: all with padding, and one rank's share."""

    whole: int
    share: int
    largest: int
    persistent: int

    @staticmethod
    def of(groups: Sequence[Sequence[int]], zero: Zero) -> Shares:
        """`groups`: the elements of each parameter, by the optimizer's groups."""
        sizes = [size for group in groups for size in group]
        if zero.stage == 3:
            share = sum(-(-size // zero.world) for size in sizes)
            whole_anyway = sum(size for size in sizes if size <= zero.persistence_threshold)
            return Shares(share * zero.world, share, max(sizes), whole_anyway)
        if zero.stage == 0:
            return Shares(sum(sizes), sum(sizes), max(sizes), 0)
        # Each group is one flat tensor, padded to an even number of elements per rank.
        share = sum(2 * -(-sum(group) // (2 * zero.world)) for group in groups)
        return Shares(share * zero.world, share, max(sizes), 0)


@dataclass(frozen=True)
class States:
    """Bytes of a network on one rank, GPU and host together. `places`: the place of each.

    `earlier_gradients`: of earlier micro-batches, alive in a forward pass. `gradients`: after the last backward pass.
    `buckets`: for communication, while gradients come. `gathered`: ZeRO-3's whole weights at a time. `step`: scratch of
    the optimizer's step. `muon`: whether Muon steps a part.
    """

    weights: int
    master: int
    moments: int
    earlier_gradients: int
    gradients: int
    buckets: int
    gathered: int
    step: int
    places: dict[str, Place]
    keeps_gradients: bool
    muon: bool = False

    def on_gpu(self, *names: str) -> int:
        return sum(getattr(self, name) for name in names if self.places.get(name, "gpu") == "gpu")


def engine_states(groups: Sequence[Sequence[int]], zero: Zero, *, muon: bool = False) -> States:
    """The memory of an engine around a network with these parameters. `muon`: whether Muon steps the first group."""
    n = Shares.of(groups, zero)
    host: Place = "host"
    places: dict[str, Place] = {}
    if zero.offload_optimizer:
        places = {"master": host, "moments": host, "step": host}
    if zero.stage == 3:
        if zero.offload_weights:
            places["weights"] = host
        if zero.offload_optimizer:
            places |= {"gradients": host, "earlier_gradients": host}
        return _zero3(n, zero, places)
    partitioned = zero.stage > 0
    b = zero.weight_bytes
    earlier, gradients = _gradients(n, zero)
    if zero.offload_optimizer and zero.stage == 2:
        places |= {"gradients": host, "earlier_gradients": host}
    return States(
        weights=b * n.whole,
        master=FP32 * n.share if partitioned else 0,
        moments=FP32 * (2 * n.share - (Shares.of(groups[:1], zero).share if muon else 0)),
        earlier_gradients=earlier,
        gradients=gradients,
        buckets=_buckets(n, zero),
        gathered=0,
        step=_scratch(n, zero) + (_muon_scratch(max(groups[0]), zero) if muon else 0),
        places=places,
        keeps_gradients=zero.stage < 2,
        muon=muon,
    )


def _whole_fp32_gradients(zero: Zero) -> bool:
    """Whether DeepSpeed uses its `BF16_Optimizer`."""
    return zero.stage == 1 and zero.weight_bytes < FP32 and not zero.offload_optimizer


def _gradients(n: Shares, zero: Zero) -> tuple[int, int]:
    """Bytes alive in the forward pass of a later micro-batch, and after the last backward pass."""
    again = zero.accumulation > 1
    b = zero.weight_bytes
    if zero.stage == 0:
        return again * b * n.whole, b * n.whole
    if _whole_fp32_gradients(zero):
        return FP32 * n.whole + again * b * n.whole, (FP32 + b) * n.whole
    if zero.stage == 1:
        # Without their own dtype, gradients wait, whole, in autograd's tensors.
        return again * FP32 * n.whole, FP32 * n.whole
    return again * FP32 * n.share, FP32 * n.share


def _scratch(n: Shares, zero: Zero) -> int:
    """The step's scratch. The fused Adam takes none, but DeepSpeed flattens gradients not accumulated flat."""
    flat = zero.stage == 0 or zero.offload_optimizer or (zero.stage < 3 and zero.weight_bytes < FP32)
    return 0 if flat else FP32 * n.share


def _muon_scratch(largest: int, zero: Zero) -> int:
    """For the largest of Muon's matrices. A partition cuts one matrix at each of its ends within the vector."""
    return largest * (ITERATIONS + CUT * (min(zero.world - 1, 2) if zero.stage else 0))


def _buckets(n: Shares, zero: Zero) -> int:
    if zero.world == 1:
        return 0
    if zero.stage == 0 or _whole_fp32_gradients(zero):
        return 0
    bucket = min(zero.reduce_bucket, n.whole)
    element = zero.weight_bytes if zero.stage == 2 else FP32
    if bucket == n.whole:
        # Sent at the end, without activations.
        return element * bucket
    # What is sent at a time is made contiguous, and then fp32.
    sent = min(bucket, n.share) if zero.reduction == "reduce" else bucket
    return element * bucket + (element + FP32 * (element < FP32)) * sent


def _zero3(n: Shares, zero: Zero, places: dict[str, Place]) -> States:
    b = zero.weight_bytes
    return States(
        weights=b * (n.share + n.persistent),
        master=FP32 * n.share if b < FP32 or zero.offload_optimizer else 0,
        moments=2 * FP32 * n.share,
        earlier_gradients=FP32 * n.share,
        gradients=FP32 * n.share,
        # Allocated whole at the start, and kept.
        buckets=FP32 * min(zero.reduce_bucket, n.whole),
        gathered=b * min(n.whole - n.persistent, zero.live_parameters + n.largest),
        step=_scratch(n, zero),
        places=places,
        keeps_gradients=False,
    )
