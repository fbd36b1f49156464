"""The IBQ function: forward and backward over any backend's passes and any codebook group, as one custom operator.

An operator and not a plain autograd.Function, so that torch.compile takes it whole, collectives and all. It is defined
by torch's low-level calls: `torch.library.custom_op` would import the compiler, 0.2 GB, at the first eager call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ibq_scale.quantize.backend import passes_for
from ibq_scale.quantize.checks import not_finite
from ibq_scale.quantize.collectives import (
    Group,
    add_at_owned,
    gather_rows,
    gather_uneven,
    owned_codes,
    rank_in,
    scatter_sum_uneven,
    size_of,
    sum_over,
)
from ibq_scale.quantize.passes import (
    Backward,
    Codes,
    Near,
    Passes,
    Pull,
    RowStatistics,
    Segments,
    WholeRowPasses,
    combine_shards,
)
from ibq_scale.quantize.terms import batch_entropy_of, batch_entropy_slope


class Settings(NamedTuple):
    """What the operator takes beside tensors: plain values, as an operator's schema wants them.

    `sizes` are the group's ranks' numbers of tokens (empty for a group of one); `group` and `replicas` are names.
    """

    sizes: list[int]
    group: str
    replicas: str
    temperature: float
    sample_weight: float
    batch_weight: float
    global_entropy: bool
    precision: str
    backend: str
    tile_bytes: int


class Forward(NamedTuple):
    """The operator's outputs: the first two and the entropy loss with gradient, the rest without.

    What stands below `batch_entropy` is kept for the backward pass: all the group's tokens (empty for a group of one),
    each segment's q̄ over this shard and the number of tokens it is a mean of, the tokens' statistics, p·C of this
    rank's own tokens (empty where whole rows are at hand), and the backend's own: `Codes.coarse_KD` and `Near`.
    """

    z_q_ND: Tensor
    hard_ND: Tensor
    entropy_loss: Tensor
    indices_N: Tensor
    sample_entropy: Tensor
    batch_entropy: Tensor
    all_z_MD: Tensor
    mean_GK: Tensor
    count_G: Tensor
    index_M: Tensor
    top_M: Tensor
    log_sum_M: Tensor
    log_sum_tau_M: Tensor
    entropy_M: Tensor
    mixed_ND: Tensor
    coarse_KD: Tensor
    near_codes_ML: Tensor
    near_scores_ML: Tensor
    near_count_M: Tensor


WITH_GRADIENT = 3
_SETTINGS = (
    "int[] sizes, str group, str replicas, float temperature, float sample_weight, float batch_weight, "
    "bool global_entropy, str precision, str backend, int tile_bytes"
)
_library: Any = torch.library.Library("ibq_scale", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    f"ibq_forward(Tensor z, Tensor rows, Tensor? mean, {_SETTINGS}) -> ({', '.join(['Tensor'] * len(Forward._fields))})"
)
_library.define(
    "ibq_backward(Tensor grad_z_q, Tensor grad_hard, Tensor grad_entropy, Tensor z, Tensor rows, Tensor[] saved, "
    f"{_SETTINGS}) -> (Tensor, Tensor)"
)


def ibq_function(z_ND: Tensor, rows_KD: Tensor, settings: Settings, mean_K: Tensor | None = None) -> Forward:
    """z (N, D) and this rank's rows (K, D) of the codebook → outputs; see `Forward`.

    `mean_K` is q̄ over this rank's rows where it is a mean over more tokens than the ranks' z (global entropy only).
    Backward gives the gradient of the *sum* over all ranks of their losses: ∂/∂z for this rank's tokens, ∂/∂C for
    this rank's rows from its group's tokens (replicas have other tokens: their gradients are to be added).
    """
    return Forward(*torch.ops.ibq_scale.ibq_forward(z_ND, rows_KD, mean_K, *settings))


def softmax_sums(z_ND: Tensor, rows_KD: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Σ q (K,) of all ranks' tokens over this rank's rows, and the number of tokens (0-dim). Without gradient."""
    layout = _Layout.of(z_ND.shape[0], settings)
    z_MD = gather_uneven(z_ND, layout.sizes, layout.group)
    sums_GK = _statistics(z_MD, rows_KD, _passes(z_ND, settings), layout, settings.temperature)[1]
    sums_K, count = sum_over([sums_GK.sum(dim=0), sums_GK.new_full((), float(sum(layout.sizes)))], layout.replicas)
    return sums_K, count


_resolve: Callable[[str], dist.ProcessGroup] = vars(dist.distributed_c10d)["_resolve_process_group"]


class _Layout(NamedTuple):
    """Where this rank's tokens are among the group's, and which tokens share a q̄.

    `replicas` are None where q̄ is each rank's own matter.
    """

    group: Group
    replicas: Group
    sizes: tuple[int, ...]
    mine: slice
    segments: Segments
    own_segment: int

    @staticmethod
    def of(tokens: int, settings: Settings) -> _Layout:
        group = _resolve(settings.group) if settings.group else None
        replicas = _resolve(settings.replicas) if settings.replicas and settings.global_entropy else None
        sizes = tuple(settings.sizes) or (tokens,)
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        ranges = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
        rank = rank_in(group)
        if settings.global_entropy:
            return _Layout(group, replicas, sizes, ranges[rank], (slice(0, sum(sizes)),), 0)
        return _Layout(group, replicas, sizes, ranges[rank], ranges, rank)


def _forward(z_ND: Tensor, rows_KD: Tensor, mean_K: Tensor | None, *values: Any) -> Forward:
    settings = Settings(*values)
    assert mean_K is None or settings.global_entropy, "a local entropy has no other tokens"
    layout = _Layout.of(z_ND.shape[0], settings)
    passes = _passes(z_ND, settings)
    z_MD = gather_uneven(z_ND, layout.sizes, layout.group)
    statistics, mean_GK, *kept = _statistics(z_MD, rows_KD, passes, layout, settings.temperature)
    # On a GPU looking would wait for the device; there the trainer's look at the loss finds it.
    if not z_MD.is_cuda and not bool(statistics.log_sum_tau.isfinite().all()):
        raise not_finite(z_MD, rows_KD)
    # Filled there: a copy from the host would wait for the device.
    count_G = torch.cat([mean_GK.new_full((1,), segment.stop - segment.start) for segment in layout.segments])
    mean_GK, count_G = sum_over([mean_GK, count_G], layout.replicas)
    # The tokens that pull at a q̄ of many micro-batches are still these: each micro-batch's loss counts once.
    mean_GK = mean_GK / count_G[:, None] if mean_K is None else mean_K[None].clone()
    hard_ND = scatter_sum_uneven(owned_codes(statistics.index, rows_KD, layout.group), layout.sizes, layout.group)
    sample_entropy = statistics.entropy[layout.mine].mean()
    (batch_entropy_G,) = sum_over([batch_entropy_of(mean_GK)], layout.group)
    batch_entropy = batch_entropy_G[layout.own_segment].clone()
    return Forward(
        hard_ND,
        hard_ND.clone(),
        settings.sample_weight * sample_entropy - settings.batch_weight * batch_entropy,
        statistics.index[layout.mine].clone(),
        sample_entropy,
        batch_entropy,
        z_MD if layout.group is not None else z_MD.new_empty((0, z_MD.shape[1])),
        mean_GK,
        count_G,
        statistics.index,
        statistics.top,
        statistics.log_sum,
        statistics.log_sum_tau,
        statistics.entropy,
        *kept,
    )


def _fake_forward(z_ND: Tensor, rows_KD: Tensor, mean_K: Tensor | None, *values: Any) -> Forward:
    settings = Settings(*values)
    tokens, dim = z_ND.shape
    everything = sum(settings.sizes) or tokens
    segments = 1 if settings.global_entropy or not settings.sizes else len(settings.sizes)
    passes = _passes(z_ND, settings)
    whole = not settings.sizes and isinstance(passes, WholeRowPasses)
    index_M, row_M = z_ND.new_empty(everything, dtype=torch.int64), z_ND.new_empty(everything)
    return Forward(
        torch.empty_like(z_ND),
        torch.empty_like(z_ND),
        z_ND.new_empty(()),
        z_ND.new_empty(tokens, dtype=torch.int64),
        z_ND.new_empty(()),
        z_ND.new_empty(()),
        z_ND.new_empty((everything if settings.sizes else 0, dim)),
        z_ND.new_empty((segments, rows_KD.shape[0])),
        z_ND.new_empty(segments),
        index_M,
        row_M,
        torch.empty_like(row_M),
        torch.empty_like(row_M),
        torch.empty_like(row_M),
        z_ND.new_empty((0 if whole else tokens, dim)),
        passes.coarse(rows_KD),
        *passes.near(z_ND.new_empty((everything, dim))),
    )


def _statistics(
    z_MD: Tensor, rows_KD: Tensor, passes: Passes, layout: _Layout, temperature: float
) -> tuple[RowStatistics, Tensor, *tuple[Tensor, ...]]:
    """Statistics of all tokens over the whole codebook, Σ q (G, K) over this shard, p·C of this rank's tokens, and what
    else the backward pass is to have: see `Forward`.
    """
    codes = Codes(rows_KD, passes.coarse(rows_KD))
    if layout.group is None and isinstance(passes, WholeRowPasses):
        sums, mean_GK = passes.sums_and_means(z_MD, codes, layout.segments)
        statistics = RowStatistics.of(sums)
        return statistics, mean_GK, z_MD.new_empty((0, z_MD.shape[1])), codes.coarse_KD, *passes.near(z_MD)
    sums, near = passes.sums(z_MD, codes)
    if layout.group is not None:
        sums = combine_shards(sums, rows_KD.shape[0], temperature, layout.sizes, layout.group)
    statistics = RowStatistics.of(sums)
    mean_GK = passes.means(z_MD, codes, statistics, layout.segments, near)
    assert sums.mixed_MD is not None
    mixed_ND = scatter_sum_uneven(sums.mixed_MD, layout.sizes, layout.group)
    return statistics, mean_GK, mixed_ND / sums.total[layout.mine, None], codes.coarse_KD, *near


def _backward(
    grad_z_q_ND: Tensor,
    grad_hard_ND: Tensor,
    grad_entropy: Tensor,
    z_ND: Tensor,
    rows_KD: Tensor,
    saved: Sequence[Tensor],
    *values: Any,
) -> tuple[Tensor, Tensor]:
    settings = Settings(*values)
    all_z_MD, mean_GK, count_G, index_M, *rest, mixed_ND, coarse_KD, near_codes, near_scores, near_count = saved
    statistics = RowStatistics(index_M, *rest)
    layout = _Layout.of(z_ND.shape[0], settings)
    passes = _passes(z_ND, settings)
    g_MD = gather_uneven(grad_z_q_ND, layout.sizes, layout.group)
    selected_MD = gather_uneven(grad_z_q_ND + grad_hard_ND, layout.sizes, layout.group)
    job = Backward(
        z_MD=all_z_MD if layout.group is not None else z_ND,
        codes=Codes(rows_KD, coarse_KD),
        g_MD=g_MD,
        statistics=statistics,
        pull=_pull(grad_entropy, mean_GK, count_G, settings, layout),
        delta_M=None,
        pulled_M=None,
        segments=layout.segments,
        near=Near(near_codes, near_scores, near_count),
    )
    if layout.group is not None or not isinstance(passes, WholeRowPasses):
        delta_N = torch.linalg.vecdot(grad_z_q_ND, mixed_ND)
        job = job._replace(delta_M=gather_uneven(delta_N, layout.sizes, layout.group))
        if job.pull.batch_GK is not None:
            (pulled_M,) = sum_over([passes.pulled(job)], layout.group)
            job = job._replace(pulled_M=pulled_M)
    grad_z_MD, grad_rows_KD = passes.gradients(job)
    add_at_owned(grad_rows_KD, index_M, selected_MD, layout.group)
    return scatter_sum_uneven(grad_z_MD, layout.sizes, layout.group), grad_rows_KD


def _fake_backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    z_ND, rows_KD = inputs[3:5]
    return torch.empty_like(z_ND), torch.empty_like(rows_KD)


def _pull(grad_entropy: Tensor, mean_GK: Tensor, count_G: Tensor, settings: Settings, layout: _Layout) -> Pull:
    """The sample entropies are means over a rank's own tokens, q̄ over its segment's; every rank has its own slope."""
    grads = gather_rows(grad_entropy.reshape(1), layout.group).unbind()
    sample_M = torch.cat(
        [(grad * (settings.sample_weight / size)).expand(size) for grad, size in zip(grads, layout.sizes, strict=True)]
    )
    if settings.batch_weight == 0:
        return Pull(sample_M, None)
    # A q̄ that many ranks share is pulled by all their losses.
    grad_G = torch.stack([torch.stack(grads).sum()]) if settings.global_entropy else torch.stack(grads)
    (grad_G,) = sum_over([grad_G], layout.replicas)
    slope_GK = batch_entropy_slope(mean_GK).mul_(settings.batch_weight)
    return Pull(sample_M, slope_GK.mul_((grad_G / count_G)[:, None]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z_ND, rows_KD, _, *settings = inputs
    out = Forward(*output)
    ctx.settings = settings
    ctx.mark_non_differentiable(*output[WITH_GRADIENT:])
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(z_ND, rows_KD, *out[Forward._fields.index("all_z_MD") :])


def _call_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    z_ND, rows_KD, *saved = ctx.saved_tensors
    upstream = (grad.contiguous() for grad in grads[:WITH_GRADIENT])
    grad_z_ND, grad_rows_KD = torch.ops.ibq_scale.ibq_backward(*upstream, z_ND, rows_KD, saved, *ctx.settings)
    return grad_z_ND, grad_rows_KD, None, *([None] * len(ctx.settings))


def _passes(z_ND: Tensor, settings: Settings) -> Passes:
    return passes_for(z_ND, settings.backend, settings.precision, settings.temperature, settings.tile_bytes or None)


def group_name(group: Group) -> str:
    """How an operator names a group; empty for a group of one."""
    return "" if size_of(group) == 1 else str(group.group_name)  # type: ignore[union-attr]


_library.impl("ibq_forward", _forward, "CompositeExplicitAutograd")
_library.impl("ibq_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ibq_scale::ibq_forward", _fake_forward, lib=_library)
torch.library.register_fake("ibq_scale::ibq_backward", _fake_backward, lib=_library)
torch.library.register_autograd("ibq_scale::ibq_forward", _call_backward, setup_context=_setup, lib=_library)
