"""The IBQ function's Triton kernels. Most multiply tiles of S = z Cᵀ. Three work on each token's list of candidates.

Statistics and sums are fp32. Products are fp32, tf32 or bf16, by the operands and PRECISION. Operands are read in
chunks of BD dimensions, so the shared memory of a tile does not grow with D. Each program writes its own part of a
result, and torch adds the parts in a fixed order.

Candidates of a token are the codes with a share of softmax(S/τ), by a bound on the products' rounding
(`triton_backend`). There are few, and their scores are computed again in fp64. A token with more than L is *flat*: its
products are accurate enough for S/τ. Its count is −1, and its softmax(S/τ) comes from the products.

Formulas and symbols: `backend_interface`. Shape letters: `ibq_scale.quantize`. z, g (M, D) and c (K, D) are a product's
operands, with contiguous rows. A loop is split into P parts of `codes_a_split` codes or `rows_a_split` tokens. inv_tau
is 1/τ.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _rows(x, row, rows, start, D: tl.constexpr, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Dimensions start … start + BD of some rows, zeros beyond the edges. 64-bit addresses: 2^31 is 8M codes of 256."""
    d = start + tl.arange(0, BD)
    places = x + row.to(tl.int64)[:, None] * D + d[None, :]
    return tl.load(places, mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    z, row, rows, c, code, codes,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """z cᵀ (BM, BK) of a tile."""
    S = tl.zeros((BM, BK), tl.float32)
    for start in range(0, D, BD):
        S = tl.dot(
            _rows(z, row, rows, start, D, BD), tl.trans(_rows(c, code, codes, start, D, BD)), S,
            input_precision=PRECISION,
        )  # fmt: skip
    return S


@triton.jit
def _top(S, start):  # type: ignore[no-untyped-def]
    """The maximum of each row of a tile, and its code: the first where several are equal."""
    top, place = tl.max(S, axis=1, return_indices=True, return_indices_tie_break_left=True)
    return top, start + place


@triton.jit
def _moved(total, weighted, shift):  # type: ignore[no-untyped-def]
    """Σ eˣ and Σ eˣ x, with x measured from a reference higher by −shift."""
    scale = tl.exp(shift)
    # A reference of −∞ has no sums, and 0 · −∞ is no number.
    return scale * total, scale * (weighted + tl.where(scale > 0, shift, 0.0) * total)


@triton.jit
def _tau_sums(S, top, best, new, total, weighted, inv_tau):  # type: ignore[no-untyped-def]
    """Adds a tile to Σ e^x and Σ e^x x, x = (S − m)/τ, while m goes from `best` to `new`. `top` is the tile's."""
    x = (S - top[:, None]) * inv_tau
    e = tl.exp(x)
    # Beyond the last code it is 0 · −∞.
    tile_total, tile_weighted = tl.sum(e, axis=1), tl.sum(tl.where(e > 0, e * x, 0.0), axis=1)
    tile_total, tile_weighted = _moved(tile_total, tile_weighted, (top - new) * inv_tau)
    total, weighted = _moved(total, weighted, (best - new) * inv_tau)
    return total + tile_total, weighted + tile_weighted


@triton.jit  # type: ignore[untyped-decorator]
def _sums_kernel(  # type: ignore[no-untyped-def]
    z, c, index, top, total, total_tau, weighted, tile_top, weights, M, K, codes_a_split, inv_tau,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sums of each token over a part of the codes (`PartSums`), rescaled as the maximum grows.

    index int32, top, total, total_tau, weighted: (P, M). tile_top: maxima over tiles of BK codes (T, M). weights:
    e^(S − tile_top) (M, K), in the operands' dtype.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    live = row < M
    best = tl.full((BM,), -float("inf"), tl.float32)
    best_index = tl.zeros((BM,), tl.int32)
    sum_p = tl.zeros((BM,), tl.float32)
    sum_q = tl.zeros((BM,), tl.float32)
    sum_qx = tl.zeros((BM,), tl.float32)
    first = split * codes_a_split
    last = tl.minimum(first + codes_a_split, K)
    for start in range(first, last, BK):
        code = start + tl.arange(0, BK)
        S = _product(z, row, M, c, code, last, D, BD, PRECISION, BM, BK)
        S = tl.where((code < last)[None, :], S, -float("inf"))
        here, place = _top(S, start)
        best_index = tl.where(here > best, place, best_index)
        new = tl.maximum(best, here)
        e = tl.exp(S - here[:, None])
        places = weights + row.to(tl.int64)[:, None] * K + code[None, :]
        tl.store(places, e.to(weights.dtype.element_ty), mask=live[:, None] & (code < last)[None, :])
        tl.store(tile_top + (start // BK) * M + row, here, mask=live)
        sum_p = sum_p * tl.exp(best - new) + tl.sum(e, axis=1) * tl.exp(here - new)
        sum_q, sum_qx = _tau_sums(S, here, best, new, sum_q, sum_qx, inv_tau)
        best = new
    at = split * M + row
    tl.store(index + at, best_index, mask=live)
    tl.store(top + at, best, mask=live)
    tl.store(total + at, sum_p, mask=live)
    tl.store(total_tau + at, sum_q, mask=live)
    tl.store(weighted + at, sum_qx, mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def _soft_codes_kernel(  # type: ignore[no-untyped-def]
    c, tile_top, weights, top, soft_codes, M, K, codes_a_split, codes_a_top,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Σ e^(S − top) C over a part of the codes (`PartSums.soft_codes_MD`).

    tile_top (T, M), weights (M, K): of `_sums_kernel`, with tiles of `codes_a_top` codes, a multiple of BK. top: (M,).
    soft_codes: (P, M, D).
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    split = tl.program_id(1)
    live = row < M
    row_top = tl.load(top + row, mask=live, other=0.0)
    soft = tl.zeros((BM, BD), tl.float32)
    first = split * codes_a_split
    last = tl.minimum(first + codes_a_split, K)
    for start in range(first, last, BK):
        code = start + tl.arange(0, BK)
        inside = code < last
        places = weights + row.to(tl.int64)[:, None] * K + code[None, :]
        e = tl.load(places, mask=live[:, None] & inside[None, :], other=0.0)
        here = tl.load(tile_top + (start // codes_a_top) * M + row, mask=live, other=0.0)
        e = (e * tl.exp(here - row_top)[:, None]).to(e.dtype)
        places = c + code.to(tl.int64)[:, None] * D + d[None, :]
        c_tile = tl.load(places, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        soft = tl.dot(e, c_tile, soft, input_precision=PRECISION)
    places = soft_codes + (split.to(tl.int64) * M + row)[:, None] * D + d[None, :]
    tl.store(places, soft, mask=live[:, None] & (d < D)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _appended(places, codes, found, count, most: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes the codes found behind `count` others, as far as there is room. Returns the new count."""
    place = count + tl.cumsum(found.to(tl.int32), axis=0) - 1
    tl.store(places + place, codes, mask=found & (place < most))
    return count + tl.sum(found.to(tl.int32), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _candidates_kernel(  # type: ignore[no-untyped-def]
    weights, tile_top, tile_norm, size, best, candidates, candidate_count, rivals, rival_count, M, K, first_code,
    margin, slack, TOP: tl.constexpr, L: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Appends a token's candidates among K codes from `first_code` on to its list, and its rivals to another.

    A rival may be the argmax: it may score `best`. A candidate may score `best − margin`. A score's error is at most
    tile_norm · size + slack.

    weights (M, K), tile_top (T, M): of `_sums_kernel`, in tiles of TOP codes. tile_norm: largest norm of a tile's codes
    (T,). size, best, counts: (M,). candidates: int32 (M, L). rivals: int32 (M, R). Counts go on beyond full lists.
    """
    row = tl.program_id(0).to(tl.int64)
    row_size, row_best = tl.load(size + row), tl.load(best + row)
    count, count_rivals = tl.load(candidate_count + row), tl.load(rival_count + row)
    for start in range(0, K, BC):
        code = start + tl.arange(0, BC)
        inside = code < K
        here = tl.load(tile_top + (code // TOP) * M + row, mask=inside, other=-float("inf"))
        norm = tl.load(tile_norm + code // TOP, mask=inside, other=0.0)
        need = row_best - here - norm * row_size - slack
        if tl.min(need, axis=0) <= margin:
            e = tl.load(weights + row * K + code, mask=need <= margin, other=-1.0).to(tl.float32)
            count = _appended(candidates + row * L, first_code + code, e >= tl.exp(need - margin), count, L)
            rival = e >= tl.exp(need)
            count_rivals = _appended(rivals + row * R, first_code + code, rival, count_rivals, R)
    tl.store(candidate_count + row, count)
    tl.store(rival_count + row, count_rivals)


@triton.jit  # type: ignore[untyped-decorator]
def _rescore_kernel(  # type: ignore[no-untyped-def]
    z, c, candidates, candidate_count, rivals, rival_count, scores, index, top, total_tau, weighted, inv_tau,
    D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, R: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """A token's scores of candidates in fp64, rounded to fp32, its sums over them, and its best code.

    The best code is one of the rivals where the token is flat. z, c: fp32. candidates, scores: (M, L). rivals: (M, R).
    index int32, top, total_tau, weighted, counts: (M,). candidate_count becomes −1 for a flat token.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    z_row = tl.load(z + row * D + d, mask=d < D, other=0.0).to(tl.float64)
    count = tl.load(candidate_count + row)
    flat = count > L
    codes = candidates + row * L
    if flat:
        count = tl.minimum(tl.load(rival_count + row), R)
        codes = rivals + row * R
    best = tl.full((), -float("inf"), tl.float64)
    best_code = tl.full((), 0, tl.int32)
    reference = tl.full((), -float("inf"), tl.float32)
    sum_q = tl.full((), 0.0, tl.float32)
    sum_qx = tl.full((), 0.0, tl.float32)
    for start in range(0, count, BL):
        place = start + tl.arange(0, BL)
        live = place < count
        code = tl.load(codes + place, mask=live, other=0)
        c_rows = tl.load(
            c + code.to(tl.int64)[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0
        )
        exact = tl.where(live, tl.sum(c_rows.to(tl.float64) * z_row[None, :], axis=1), -float("inf"))
        here = tl.max(exact, axis=0)
        first = tl.min(tl.where(exact == here, code, 2147483647), axis=0)
        # Lists ascend: an equal one further on is no better.
        best_code = tl.where(here > best, first, best_code)
        best = tl.maximum(best, here)
        score = exact.to(tl.float32)
        new = best.to(tl.float32)
        tl.store(scores + row * L + place, score, mask=live & (flat == 0))
        x = (score - new) * inv_tau
        e = tl.where(live, tl.exp(x), 0.0)
        sum_q, sum_qx = _moved(sum_q, sum_qx, (reference - new) * inv_tau)
        sum_q += tl.sum(e, axis=0)
        sum_qx += tl.sum(tl.where(e > 0, e * x, 0.0), axis=0)
        reference = new
    tl.store(index + row, best_code)
    tl.store(top + row, reference)
    tl.store(total_tau + row, sum_q)
    tl.store(weighted + row, sum_qx)
    tl.store(candidate_count + row, tl.where(flat, -1, count))


@triton.jit  # type: ignore[untyped-decorator]
def _means_kernel(  # type: ignore[no-untyped-def]
    z, c, count, top, log_sum_tau, mean, M, K, rows_a_split, inv_tau,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Σ q of flat tokens over a part of the tokens. count, top, log_sum_tau: (M,). mean: (P, K)."""
    code = tl.program_id(0) * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    mean_sum = tl.zeros((BK,), tl.float32)
    first = split * rows_a_split
    last = tl.minimum(first + rows_a_split, M)
    for start in range(first, last, BM):
        row = start + tl.arange(0, BM)
        flat = tl.load(count + row, mask=row < last, other=0) < 0
        if tl.max(flat.to(tl.int32), axis=0) > 0:
            row_top = tl.load(top + row, mask=flat, other=0.0)
            row_log = tl.load(log_sum_tau + row, mask=flat, other=0.0)
            S = _product(z, row, last, c, code, K, D, BD, PRECISION, BM, BK)
            q = tl.exp((S - row_top[:, None]) * inv_tau - row_log[:, None])
            mean_sum += tl.sum(tl.where(flat[:, None], q, 0.0), axis=0)
    tl.store(mean + split.to(tl.int64) * K + code, mean_sum, mask=code < K)


@triton.jit  # type: ignore[untyped-decorator]
def _row_sums_kernel(  # type: ignore[no-untyped-def]
    z, c, count, top, log_sum_tau, batch, pi, M, K, codes_a_split, inv_tau,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """π of flat tokens over a part of the codes. count, top, log_sum_tau: (M,). batch: b r (K,). pi: (P, M)."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    flat = tl.load(count + row, mask=row < M, other=0) < 0
    row_pi = tl.zeros((BM,), tl.float32)
    if tl.max(flat.to(tl.int32), axis=0) > 0:
        row_top = tl.load(top + row, mask=flat, other=0.0)
        row_log = tl.load(log_sum_tau + row, mask=flat, other=0.0)
        first = split * codes_a_split
        last = tl.minimum(first + codes_a_split, K)
        for start in range(first, last, BK):
            code = start + tl.arange(0, BK)
            S = _product(z, row, M, c, code, last, D, BD, PRECISION, BM, BK)
            q = tl.exp((S - row_top[:, None]) * inv_tau - row_log[:, None])
            r = tl.load(batch + code, mask=code < last, other=0.0)
            # Codes beyond the last add nothing.
            row_pi += tl.sum(tl.where((code < last)[None, :] & flat[:, None], q * r[None, :], 0.0), axis=1)
    tl.store(pi + split * M + row, row_pi, mask=row < M)


@triton.jit
def _entropy_slope(log_q, r, pi, sample, entropy, inv_tau):  # type: ignore[no-untyped-def]
    """The entropy loss's part of ∂L/∂S: q/τ (b r − π − a (log q + H))."""
    return tl.exp(log_q) * (r - pi - sample * (log_q + entropy)) * inv_tau


@triton.jit  # type: ignore[untyped-decorator]
def _slopes_kernel(  # type: ignore[no-untyped-def]
    z, c, g, count, top, log_sum, log_sum_tau, entropy, sample, delta, pi, batch, slopes, M, K, inv_tau,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """∂L/∂S of a tile, with the entropy loss's part for flat tokens only. Neighbouring programs read the same codes.

    count, top, log_sum, log_sum_tau, entropy, sample, delta, pi: list count, m, log l, log l_τ, H, a, δ, π (M,).
    batch: b r (K,). slopes: (M, K), in the operands' dtype.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    code = tl.program_id(1) * BK + tl.arange(0, BK)
    live, inside = row < M, code < K
    S = tl.zeros((BM, BK), tl.float32)
    G = tl.zeros((BM, BK), tl.float32)
    for start in range(0, D, BD):
        c_tile = tl.trans(_rows(c, code, K, start, D, BD))
        S = tl.dot(_rows(z, row, M, start, D, BD), c_tile, S, input_precision=PRECISION)
        G = tl.dot(_rows(g, row, M, start, D, BD), c_tile, G, input_precision=PRECISION)
    row_top = tl.load(top + row, mask=live, other=0.0)
    row_log = tl.load(log_sum + row, mask=live, other=0.0)
    row_delta = tl.load(delta + row, mask=live, other=0.0)
    dS = tl.exp(S - (row_top + row_log)[:, None]) * (G - row_delta[:, None])
    flat = tl.load(count + row, mask=live, other=0) < 0
    if tl.max(flat.to(tl.int32), axis=0) > 0:
        row_log_tau = tl.load(log_sum_tau + row, mask=flat, other=0.0)
        row_entropy = tl.load(entropy + row, mask=flat, other=0.0)
        row_sample = tl.load(sample + row, mask=flat, other=0.0)
        row_pi = tl.load(pi + row, mask=flat, other=0.0)
        r = tl.load(batch + code, mask=inside, other=0.0)
        log_q = (S - row_top[:, None]) * inv_tau - row_log_tau[:, None]
        more = _entropy_slope(log_q, r[None, :], row_pi[:, None], row_sample[:, None], row_entropy[:, None], inv_tau)
        dS += tl.where(flat[:, None], more, 0.0)
    places = slopes + row.to(tl.int64)[:, None] * K + code[None, :]
    tl.store(places, dS.to(slopes.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _candidate_slopes_kernel(  # type: ignore[no-untyped-def]
    c, candidates, count, scores, top, log_sum_tau, entropy, sample, pi, batch, slopes, grad_z, K, first_code, inv_tau,
    D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Adds the entropy loss's part of ∂L/∂S at a token's candidates among K codes from `first_code` on, and of ∂L/∂z.

    c: fp32 (K, D). candidates, scores: (M, L). count, top, log_sum_tau, entropy, sample, pi: (M,). batch: b r (K,).
    slopes (M, K) and grad_z (M, D) are added to. Parts of a token's candidates nearly cancel in ∂L/∂z, so rounded codes
    would hide the rest: here they are fp32.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    grad = tl.load(grad_z + row * D + d, mask=d < D, other=0.0)
    row_top, row_log = tl.load(top + row), tl.load(log_sum_tau + row)
    row_entropy, row_sample, row_pi = tl.load(entropy + row), tl.load(sample + row), tl.load(pi + row)
    for start in range(0, tl.load(count + row), BL):
        place = start + tl.arange(0, BL)
        live = place < tl.load(count + row)
        code = tl.load(candidates + row * L + place, mask=live, other=0) - first_code
        live = live & (code >= 0) & (code < K)
        score = tl.load(scores + row * L + place, mask=live, other=0.0)
        r = tl.load(batch + code, mask=live, other=0.0)
        more = _entropy_slope((score - row_top) * inv_tau - row_log, r, row_pi, row_sample, row_entropy, inv_tau)
        places = slopes + row * K + code
        before = tl.load(places, mask=live, other=0.0).to(tl.float32)
        tl.store(places, (before + more).to(slopes.dtype.element_ty), mask=live)
        c_rows = tl.load(
            c + code.to(tl.int64)[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0
        )
        grad += tl.sum(tl.where(live, more, 0.0)[:, None] * c_rows, axis=0)
    tl.store(grad_z + row * D + d, grad, mask=d < D)


@triton.jit  # type: ignore[untyped-decorator]
def _best_kernel(  # type: ignore[no-untyped-def]
    z, c, offset, index, top, second, M, K, codes_a_split,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The best code of each token in a part of the codes, by S + offset, and the second best score.

    offset: (K,). index int32, top, second: (P, M).
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    best = tl.full((BM,), -float("inf"), tl.float32)
    next_best = tl.full((BM,), -float("inf"), tl.float32)
    best_index = tl.zeros((BM,), tl.int32)
    first = split * codes_a_split
    last = tl.minimum(first + codes_a_split, K)
    for start in range(first, last, BK):
        code = start + tl.arange(0, BK)
        live = code < last
        S = _product(z, row, M, c, code, last, D, BD, PRECISION, BM, BK)
        S += tl.load(offset + code, mask=live, other=0.0)[None, :]
        S = tl.where(live[None, :], S, -float("inf"))
        here, place = _top(S, start)
        others = tl.where(code[None, :] == place[:, None], -float("inf"), S)
        # The best of the lower of the two tops and of both seconds.
        next_best = tl.maximum(tl.maximum(next_best, tl.max(others, axis=1)), tl.minimum(best, here))
        best_index = tl.where(here > best, place, best_index)
        best = tl.maximum(best, here)
    at = split * M + row
    tl.store(index + at, best_index, mask=row < M)
    tl.store(top + at, best, mask=row < M)
    tl.store(second + at, next_best, mask=row < M)
