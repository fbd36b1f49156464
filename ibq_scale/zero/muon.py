"""Muon under ZeRO-1 and 2: matrices that a boundary of the ranks' partitions cuts.

The momentum is elementwise and stays in the partitions. The Newton–Schulz iterations need whole matrices. A rank's
partition is one interval of the group's flat vector, so the rank holds whole matrices and at most two cut ones. The
holders of a cut matrix send each other their pieces in bf16, and each of them computes the whole step. DeepSpeed 0.19.8
has a Muon too. It orthogonalises before the gradient's norm and clipping, so both would be of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ibq_scale.models.muon import Muon, Part
from ibq_scale.zero.master_weights import partitioned


def find_parts(engine: Any, optimizer: Muon) -> None:
    """Tells the optimizer which matrices its flat parameters hold."""
    optimizer.gather = gather
    for name, parameter in engine.module.named_parameters():
        fragment = partitioned(engine, name, parameter)
        if fragment is not None and optimizer.takes(fragment.flat):
            part = Part(parameter.shape, fragment.start, fragment.length, fragment.offset)
            optimizer.parts.setdefault(fragment.flat, []).append(part)


def gather(flat: Tensor, part: Part, values: Tensor) -> Callable[[], Tensor]:
    """Begins the exchange of a cut matrix. The result waits for it and returns all elements.

    `flat` is this rank's partition, `values` (length,) its part. Two ranks share at most one matrix of a vector, so
    their messages need no order.
    """
    rank, partition, length = dist.get_rank(), flat.numel(), part.shape.numel()
    # The matrix's first element in the vector of all ranks.
    first = rank * partition + part.offset - part.start
    whole = values.new_empty(length)
    whole[part.start : part.start + part.length] = values
    messages = []
    for other in range(first // partition, (first + length - 1) // partition + 1):
        if other != rank:
            start, stop = (min(max(edge * partition - first, 0), length) for edge in (other, other + 1))
            messages.append(dist.P2POp(dist.isend, values, other))
            messages.append(dist.P2POp(dist.irecv, whole[start:stop], other))
    works = dist.batch_isend_irecv(messages)

    def wait() -> Tensor:
        for work in works:
            work.wait()
        # The messages own the memory until now.
        messages.clear()
        return whole

    return wait
