"""Elementwise Triton kernels of the cuBLAS backend: each walks once over S = z Cᵀ of a block of tokens.

S and G = g Cᵀ are fp32 products by cuBLAS, stored by codes: element (k, i) at k · stride + i for B tokens and K codes.
Formulas: `backend_interface`. A program takes BM tokens × BK codes at a time. Loops over codes are split into parts of
`codes_a_split`. Each program writes its own part, and torch adds the parts in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ibq_scale.quantize.kernels import _entropy_slope, _tau_sums, _top


@triton.jit
def _places(token, code, stride):  # type: ignore[no-untyped-def]
    """Offsets (BM, BK), 64 bits."""
    return code.to(tl.int64)[None, :] * stride + token[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _column_sums_kernel(  # type: ignore[no-untyped-def]
    scores, index, top, total, total_tau, weighted, B, K, stride, codes_a_split, inv_tau,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sums of a token over a part of the codes (`PartSums`). scores: S (K, B). The others: (P, B), index int32."""
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    live = token < B
    best = tl.full((BM,), -float("inf"), tl.float32)
    best_index = tl.zeros((BM,), tl.int32)
    sum_p = tl.zeros((BM,), tl.float32)
    sum_q = tl.zeros((BM,), tl.float32)
    sum_qx = tl.zeros((BM,), tl.float32)
    first = split * codes_a_split
    last = tl.minimum(first + codes_a_split, K)
    for start in range(first, last, BK):
        code = start + tl.arange(0, BK)
        # Tokens beyond the last get zeros: a row of −∞ has no maximum to subtract.
        S = tl.load(scores + _places(token, code, stride), mask=live[:, None] & (code < last)[None, :], other=0.0)
        S = tl.where((code < last)[None, :], S, -float("inf"))
        here, place = _top(S, start)
        best_index = tl.where(here > best, place, best_index)
        new = tl.maximum(best, here)
        sum_p = sum_p * tl.exp(best - new) + tl.sum(tl.exp(S - new[:, None]), axis=1)
        sum_q, sum_qx = _tau_sums(S, here, best, new, sum_q, sum_qx, inv_tau)
        best = new
    at = split * B + token
    tl.store(index + at, best_index, mask=live)
    tl.store(top + at, best, mask=live)
    tl.store(total + at, sum_p, mask=live)
    tl.store(total_tau + at, sum_q, mask=live)
    tl.store(weighted + at, sum_qx, mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def _column_means_kernel(  # type: ignore[no-untyped-def]
    scores, top, log_sum_tau, mean, B, K, stride, inv_tau, BM: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """mean (K,) += Σ q over the block's tokens. scores: S (K, B). top, log_sum_tau: m, log l_τ (B,)."""
    code = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = code < K
    q_sum = tl.load(mean + code, mask=inside, other=0.0)
    for start in range(0, B, BM):
        token = start + tl.arange(0, BM)
        live = token < B
        S = tl.load(scores + _places(token, code, stride), mask=live[:, None] & inside[None, :], other=-float("inf"))
        row_top = tl.load(top + token, mask=live, other=0.0)
        row_log = tl.load(log_sum_tau + token, mask=live, other=0.0)
        q_sum += tl.sum(tl.exp((S - row_top[:, None]) * inv_tau - row_log[:, None]), axis=0)
    tl.store(mean + code, q_sum, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _column_dots_kernel(  # type: ignore[no-untyped-def]
    scores, products, top, log_sum, log_sum_tau, batch, delta, pi, B, K, stride, codes_a_split, inv_tau,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """δ and π over a part of the codes, both (P, B). scores, products: S, G (K, B). batch: b r (K,).

    top, log_sum, log_sum_tau: m, log l, log l_τ (B,).
    """
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    live = token < B
    row_top = tl.load(top + token, mask=live, other=0.0)
    row_log = tl.load(log_sum + token, mask=live, other=0.0)
    row_log_tau = tl.load(log_sum_tau + token, mask=live, other=0.0)
    row_delta = tl.zeros((BM,), tl.float32)
    row_pi = tl.zeros((BM,), tl.float32)
    first = split * codes_a_split
    last = tl.minimum(first + codes_a_split, K)
    for start in range(first, last, BK):
        code = start + tl.arange(0, BK)
        mask = live[:, None] & (code < last)[None, :]
        places = _places(token, code, stride)
        x = tl.load(scores + places, mask=mask, other=-float("inf")) - row_top[:, None]
        G = tl.load(products + places, mask=mask, other=0.0)
        r = tl.load(batch + code, mask=code < last, other=0.0)
        row_delta += tl.sum(tl.exp(x - row_log[:, None]) * G, axis=1)
        row_pi += tl.sum(tl.exp(x * inv_tau - row_log_tau[:, None]) * r[None, :], axis=1)
    tl.store(delta + split * B + token, row_delta, mask=live)
    tl.store(pi + split * B + token, row_pi, mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def _column_slopes_kernel(  # type: ignore[no-untyped-def]
    scores, products, top, log_sum, log_sum_tau, entropy, sample, delta, pi, batch, B, K, stride, inv_tau,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """G becomes ∂L/∂S. scores, products: S, G (K, B). batch: b r (K,).

    top, log_sum, log_sum_tau, entropy, sample, delta, pi: m, log l, log l_τ, H, a, δ, π (B,).
    """
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    code = tl.program_id(1) * BK + tl.arange(0, BK)
    live, inside = token < B, code < K
    mask = live[:, None] & inside[None, :]
    places = _places(token, code, stride)
    x = tl.load(scores + places, mask=mask, other=0.0) - tl.load(top + token, mask=live, other=0.0)[:, None]
    G = tl.load(products + places, mask=mask, other=0.0)
    p = tl.exp(x - tl.load(log_sum + token, mask=live, other=0.0)[:, None])
    log_q = x * inv_tau - tl.load(log_sum_tau + token, mask=live, other=0.0)[:, None]
    slope = _entropy_slope(
        log_q,
        tl.load(batch + code, mask=inside, other=0.0)[None, :],
        tl.load(pi + token, mask=live, other=0.0)[:, None],
        tl.load(sample + token, mask=live, other=0.0)[:, None],
        tl.load(entropy + token, mask=live, other=0.0)[:, None],
        inv_tau,
    )
    row_delta = tl.load(delta + token, mask=live, other=0.0)[:, None]
    tl.store(products + places, p * (G - row_delta) + slope, mask=mask)
