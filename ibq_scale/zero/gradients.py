"""ZeRO-1 under bf16 sums each gradient on the rank that applies it, once a step, in fp32.

DeepSpeed 0.19.8 all-reduces there: twice the bytes, and a second copy of all gradients. Its `BF16_Optimizer` keeps the
sums of the micro-batches in one flat fp32 vector a group, of which each rank updates one of equal parts: what a
reduce-scatter takes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

from ibq_scale.config.deepspeed import OFFLOADS, offloaded

Reduction = Literal["all-reduce", "reduce", "reduce-scatter"]


def reduction(config: dict[str, Any]) -> Reduction:
    """How an engine of this completed DeepSpeed config sums gradients below ZeRO-3.

    A reduce-scatter where `reduce_scatter` is set for ZeRO-1 under bf16, where 0.19.8 itself ignores it. Else, where
    `use_multi_rank_bucket_allreduce` is off, DeepSpeed sends each rank its part of a bucket by a reduce of its own.
    """
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage == 1 and config["bf16"]["enabled"] and not offloaded(zero, OFFLOADS[0]):
        return "reduce-scatter" if zero.get("reduce_scatter") else "all-reduce"
    apart = zero.get("reduce_scatter", True) and not zero.get("use_multi_rank_bucket_allreduce", True)
    return "reduce" if stage in (1, 2) and apart else "all-reduce"


def scatter_gradients(optimizer: Any) -> None:
    """Makes an engine's `BF16_Optimizer` reduce-scatter. Its norms are then sums over ranks, the same on each."""
    import deepspeed.comm as dist

    parts = optimizer.fp32_groups_gradient_flat_partition

    def reduce_gradients(pipeline_parallel: bool = False) -> None:
        """The engine calls it in the place of its all-reduce, where there is one."""
        for flat, part, group in zip(
            optimizer.fp32_groups_gradients_flat, parts, optimizer.real_dp_process_group, strict=True
        ):
            mean = part.new_empty(part.shape)
            dist.reduce_scatter_fn(mean, flat, group=group)
            part.copy_(mean.mul_(1.0 / dist.get_world_size(group)))

    optimizer.reduce_gradients = reduce_gradients
    optimizer.get_grads_for_norm = lambda for_clipping=False: parts if for_clipping else (parts, {})
    # The ranks that norms are summed over.
    optimizer.mpu = SimpleNamespace(get_model_parallel_group=lambda: optimizer.real_dp_process_group[0])
