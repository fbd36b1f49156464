"""ZeRO-1 under bf16 reduce-scatters its gradients, once a step, in fp32.

DeepSpeed 0.19.8 all-reduces them: twice the bytes, and a second copy of all gradients. Its `BF16_Optimizer` keeps the
sums over micro-batches in one flat fp32 vector a group. Each rank updates one of W equal parts of the vector, as a
reduce-scatter wants it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

from ibq_scale.config.deepspeed import OFFLOADS, offloaded

Reduction = Literal["all-reduce", "reduce", "reduce-scatter"]


def reduction(config: dict[str, Any]) -> Reduction:
    """How an engine of this completed DeepSpeed config sums gradients below ZeRO-3.

    ZeRO-1 under bf16: a reduce-scatter if `reduce_scatter` is set (0.19.8 itself ignores the key). Else, if
    `use_multi_rank_bucket_allreduce` is off, DeepSpeed calls one reduce for each rank and bucket.
    """
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage == 1 and config["bf16"]["enabled"] and not offloaded(zero, OFFLOADS[0]):
        return "reduce-scatter" if zero.get("reduce_scatter") else "all-reduce"
    apart = zero.get("reduce_scatter", True) and not zero.get("use_multi_rank_bucket_allreduce", True)
    return "reduce" if stage in (1, 2) and apart else "all-reduce"


def scatter_gradients(optimizer: Any) -> None:
    """Makes an engine's `BF16_Optimizer` reduce-scatter. It then sums its gradient norm over the ranks."""
    import deepspeed.comm as dist

    parts = optimizer.fp32_groups_gradient_flat_partition

    def reduce_gradients(pipeline_parallel: bool = False) -> None:
        """The engine calls it instead of its all-reduce, at the end of an accumulation."""
        for flat, part, group in zip(
            optimizer.fp32_groups_gradients_flat, parts, optimizer.real_dp_process_group, strict=True
        ):
            mean = part.new_empty(part.shape)
            dist.reduce_scatter_fn(mean, flat, group=group)
            part.copy_(mean.mul_(1.0 / dist.get_world_size(group)))

    optimizer.reduce_gradients = reduce_gradients
    optimizer.get_grads_for_norm = lambda for_clipping=False: parts if for_clipping else (parts, {})
    # `get_global_norm_of_tensors` sums over this group.
    optimizer.mpu = SimpleNamespace(get_model_parallel_group=lambda: optimizer.real_dp_process_group[0])
