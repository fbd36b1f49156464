"""The IBQ function: forward and backward over any backend and any codebook group, as one custom operator.

torch.compile takes an operator whole, with its collectives, unlike an autograd.Function. It is defined by torch's
low-level calls: `torch.library.custom_op` would import the compiler, 0.2 GB, at the first eager call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ibq_scale.quantize.backend import choose, made
from ibq_scale.quantize.backend_interface import (
    Backend,
    BackwardInputs,
    Candidates,
    Codebook,
    EntropyGradient,
    RowStatistics,
    Segments,
    WholeRowBackend,
    combine_shards,
)
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
from ibq_scale.quantize.product import Precision
from ibq_scale.quantize.quantized import batch_entropy_of, batch_entropy_slope, not_finite


class Settings(NamedTuple):
    """The operator's arguments beside tensors. An operator's schema allows plain values only.

    `sizes`: numbers of tokens of the group's ranks, empty for a group of one. `group` and `replicas` are names.
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


class ForwardOutputs(NamedTuple):
    """The operator's outputs: the first two and the entropy loss with gradient, the rest without.

    Fields below `batch_entropy` are kept for the backward pass: all the group's tokens (empty for a group of one), each
    segment's q̄ over this shard and its number of tokens, the tokens' statistics, p·C of this rank's own tokens (empty
    for a whole-row backend), `Codebook.rounded_KD`, and `Candidates`.
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
    soft_codes_ND: Tensor
    rounded_KD: Tensor
    candidate_codes_ML: Tensor
    candidate_scores_ML: Tensor
    candidate_count_M: Tensor


WITH_GRADIENT = 3
_SETTINGS = (
    "int[] sizes, str group, str replicas, float temperature, float sample_weight, float batch_weight, "
    "bool global_entropy, str precision, str backend, int tile_bytes"
)
library: Any = torch.library.Library("ibq_scale", "DEF")  # type: ignore[no-untyped-call]
_OUTPUTS = ", ".join(["Tensor"] * len(ForwardOutputs._fields))
library.define(f"ibq_forward(Tensor z, Tensor rows, Tensor? mean, {_SETTINGS}) -> ({_OUTPUTS})")
library.define(
    "ibq_backward(Tensor grad_z_q, Tensor grad_hard, Tensor grad_entropy, Tensor z, Tensor rows, Tensor[] saved, "
    f"{_SETTINGS}) -> (Tensor, Tensor)"
)


def ibq_function(z_ND: Tensor, rows_KD: Tensor, settings: Settings, mean_K: Tensor | None = None) -> ForwardOutputs:
    """z (N, D) and this rank's rows (K, D) of the codebook → `ForwardOutputs`.

    `mean_K` is q̄ over this rank's rows where it is a mean over more tokens than the ranks' z (global entropy only).
    BackwardInputs gives the gradient of the *sum* over all ranks of their losses: ∂/∂z for this rank's tokens, ∂/∂C for
    this rank's rows from its group's tokens (replicas have other tokens: their gradients are to be added).
    """
    return ForwardOutputs(*torch.ops.ibq_scale.ibq_forward(z_ND, rows_KD, mean_K, *settings))


def softmax_sums(z_ND: Tensor, rows_KD: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Σ q (K,) of all ranks' tokens over this rank's rows, and the number of tokens (0-dim). Without gradient."""
    layout = _Layout.of(z_ND.shape[0], settings)
    z_MD = gather_uneven(z_ND, layout.sizes, layout.group)
    sums_GK = _statistics(z_MD, rows_KD, _backend_of(z_ND, settings), layout, settings.temperature)[1]
    sums_K, count = sum_over([sums_GK.sum(dim=0), sums_GK.new_full((), float(sum(layout.sizes)))], layout.replicas)
    return sums_K, count


_resolve: Callable[[str], dist.ProcessGroup] = vars(dist.distributed_c10d)["_resolve_process_group"]


class _Layout(NamedTuple):
    """The place of this rank's tokens among the group's, and the ranges of tokens with one q̄.

    `replicas` are None where each rank has its own q̄.
    """

    group: Group
    replicas: Group
    sizes: tuple[int, ...]
    mine: slice
    segments: Segments
    own_segment: int

    @staticmethod
    def of(tokens: int, settings: Settings) -> _Layout:
        group = group_of(settings.group)
        replicas = _resolve(settings.replicas) if settings.replicas and settings.global_entropy else None
        sizes = tuple(settings.sizes) or (tokens,)
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        ranges = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
        rank = rank_in(group)
        if settings.global_entropy:
            return _Layout(group, replicas, sizes, ranges[rank], (slice(0, sum(sizes)),), 0)
        return _Layout(group, replicas, sizes, ranges[rank], ranges, rank)


def _forward(z_ND: Tensor, rows_KD: Tensor, mean_K: Tensor | None, *values: Any) -> ForwardOutputs:
    settings = Settings(*values)
    assert mean_K is None or settings.global_entropy, "a local entropy has no other tokens"
    layout = _Layout.of(z_ND.shape[0], settings)
    backend = _backend_of(z_ND, settings)
    z_MD = gather_uneven(z_ND, layout.sizes, layout.group)
    statistics, mean_GK, *kept = _statistics(z_MD, rows_KD, backend, layout, settings.temperature)
    # On a GPU the check would wait for the device. There the trainer's check of the loss finds it.
    if not z_MD.is_cuda and not bool(statistics.log_sum_tau.isfinite().all()):
        raise not_finite(z_MD, rows_KD)
    # Filled there: a copy from the host would wait for the device.
    count_G = torch.cat([mean_GK.new_full((1,), segment.stop - segment.start) for segment in layout.segments])
    mean_GK, count_G = sum_over([mean_GK, count_G], layout.replicas)
    # The gradient at a q̄ of many micro-batches goes to these tokens only: each micro-batch's loss counts once.
    mean_GK = mean_GK / count_G[:, None] if mean_K is None else mean_K[None].clone()
    hard_ND = scatter_sum_uneven(owned_codes(statistics.index, rows_KD, layout.group), layout.sizes, layout.group)
    entropy_N = statistics.entropy[layout.mine]
    # A rank may have no tokens where other ranks of the group have some.
    sample_entropy = entropy_N.mean() if len(entropy_N) else entropy_N.sum()
    (batch_entropy_G,) = sum_over([batch_entropy_of(mean_GK)], layout.group)
    batch_entropy = batch_entropy_G[layout.own_segment].clone()
    return ForwardOutputs(
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


def _fake_forward(z_ND: Tensor, rows_KD: Tensor, mean_K: Tensor | None, *values: Any) -> ForwardOutputs:
    settings = Settings(*values)
    tokens, dim = z_ND.shape
    everything = sum(settings.sizes) or tokens
    segments = 1 if settings.global_entropy or not settings.sizes else len(settings.sizes)
    backend = _backend_of(z_ND, settings)
    whole = not settings.sizes and isinstance(backend, WholeRowBackend)
    index_M, row_M = z_ND.new_empty(everything, dtype=torch.int64), z_ND.new_empty(everything)
    return ForwardOutputs(
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
        backend.rounded(rows_KD),
        *backend.empty_candidates(z_ND.new_empty((everything, dim))),
    )


def _statistics(
    z_MD: Tensor, rows_KD: Tensor, backend: Backend, layout: _Layout, temperature: float
) -> tuple[RowStatistics, Tensor, *tuple[Tensor, ...]]:
    """Statistics of all tokens over the whole codebook, Σ q (G, K) over this shard, p·C of this rank's tokens, and the
    last fields of `ForwardOutputs`.
    """
    codebook = Codebook(rows_KD, backend.rounded(rows_KD))
    if layout.group is None and isinstance(backend, WholeRowBackend):
        sums, mean_GK = backend.sums_and_means(z_MD, codebook, layout.segments)
        statistics = RowStatistics.of(sums)
        return (
            statistics,
            mean_GK,
            z_MD.new_empty((0, z_MD.shape[1])),
            codebook.rounded_KD,
            *backend.empty_candidates(z_MD),
        )
    sums, candidates = backend.sums(z_MD, codebook)
    if layout.group is not None:
        sums = combine_shards(sums, rows_KD.shape[0], temperature, layout.sizes, layout.group)
    statistics = RowStatistics.of(sums)
    mean_GK = backend.means(z_MD, codebook, statistics, layout.segments, candidates)
    assert sums.soft_codes_MD is not None
    soft_codes_ND = scatter_sum_uneven(sums.soft_codes_MD, layout.sizes, layout.group)
    return statistics, mean_GK, soft_codes_ND / sums.total[layout.mine, None], codebook.rounded_KD, *candidates


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
    (
        all_z_MD,
        mean_GK,
        count_G,
        index_M,
        *rest,
        soft_codes_ND,
        rounded_KD,
        candidate_codes,
        candidate_scores,
        candidate_count,
    ) = saved
    statistics = RowStatistics(index_M, *rest)
    layout = _Layout.of(z_ND.shape[0], settings)
    backend = _backend_of(z_ND, settings)
    g_MD = gather_uneven(grad_z_q_ND, layout.sizes, layout.group)
    selected_MD = gather_uneven(grad_z_q_ND + grad_hard_ND, layout.sizes, layout.group)
    inputs = BackwardInputs(
        z_MD=all_z_MD if layout.group is not None else z_ND,
        codebook=Codebook(rows_KD, rounded_KD),
        g_MD=g_MD,
        statistics=statistics,
        entropy=_entropy_gradient(grad_entropy, mean_GK, count_G, settings, layout),
        delta_M=None,
        pi_M=None,
        segments=layout.segments,
        candidates=Candidates(candidate_codes, candidate_scores, candidate_count),
    )
    if layout.group is not None or not isinstance(backend, WholeRowBackend):
        delta_N = torch.linalg.vecdot(grad_z_q_ND, soft_codes_ND)
        inputs = inputs._replace(delta_M=gather_uneven(delta_N, layout.sizes, layout.group))
        if inputs.entropy.batch_GK is not None:
            (pi_M,) = sum_over([backend.row_sums(inputs)], layout.group)
            inputs = inputs._replace(pi_M=pi_M)
    grad_z_MD, grad_rows_KD = backend.gradients(inputs)
    add_at_owned(grad_rows_KD, index_M, selected_MD, layout.group)
    return scatter_sum_uneven(grad_z_MD, layout.sizes, layout.group), grad_rows_KD


def _fake_backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    z_ND, rows_KD = inputs[3:5]
    return torch.empty_like(z_ND), torch.empty_like(rows_KD)


def _entropy_gradient(
    grad_entropy: Tensor, mean_GK: Tensor, count_G: Tensor, settings: Settings, layout: _Layout
) -> EntropyGradient:
    """a and b r. A sample entropy is a mean over a rank's tokens, q̄ over a segment's. Each rank has its own slope."""
    grads = gather_rows(grad_entropy.reshape(1), layout.group).unbind()
    sample_M = torch.cat(
        [
            (grad * (settings.sample_weight / max(size, 1))).expand(size)
            for grad, size in zip(grads, layout.sizes, strict=True)
        ]
    )
    if settings.batch_weight == 0:
        return EntropyGradient(sample_M, None)
    # The losses of all ranks reach a q̄ that they share.
    grad_G = torch.stack([torch.stack(grads).sum()]) if settings.global_entropy else torch.stack(grads)
    (grad_G,) = sum_over([grad_G], layout.replicas)
    slope_GK = batch_entropy_slope(mean_GK).mul_(settings.batch_weight)
    return EntropyGradient(sample_M, slope_GK.mul_((grad_G / count_G)[:, None]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z_ND, rows_KD, _, *settings = inputs
    out = ForwardOutputs(*output)
    ctx.settings = settings
    ctx.mark_non_differentiable(*output[WITH_GRADIENT:])
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(z_ND, rows_KD, *out[ForwardOutputs._fields.index("all_z_MD") :])


def _call_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    z_ND, rows_KD, *saved = ctx.saved_tensors
    upstream = (grad.contiguous() for grad in grads[:WITH_GRADIENT])
    # A loop of one's own may call backward under autocast, which would round products of softmaxes.
    with torch.autocast(z_ND.device.type, enabled=False):
        grad_z_ND, grad_rows_KD = torch.ops.ibq_scale.ibq_backward(*upstream, z_ND, rows_KD, saved, *ctx.settings)
    return grad_z_ND, grad_rows_KD, None, *([None] * len(ctx.settings))


def _backend_of(z_ND: Tensor, settings: Settings) -> Backend:
    # No kernel starts for a group without tokens. Its replicas may have some.
    backend = settings.backend if any(settings.sizes or [1]) else "tiled"
    precision = cast(Precision, settings.precision)
    chosen = choose(backend, z_ND.device, z_ND.dtype, z_ND.shape[1], precision)
    return made(chosen, precision, settings.temperature, settings.tile_bytes or None)


def group_of(name: str) -> Group:
    return _resolve(name) if name else None


def group_name(group: Group) -> str:
    """The group's name for an operator, empty for a group of one."""
    return "" if size_of(group) == 1 else str(group.group_name)  # type: ignore[union-attr]


library.impl("ibq_forward", _forward, "CompositeExplicitAutograd")
library.impl("ibq_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ibq_scale::ibq_forward", _fake_forward, lib=library)
torch.library.register_fake("ibq_scale::ibq_backward", _fake_backward, lib=library)
torch.library.register_autograd("ibq_scale::ibq_forward", _call_backward, setup_context=_setup, lib=library)
