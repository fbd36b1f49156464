"""The IBQ function's kernels in Triton. Each works on tiles of S = z Cᵀ.

Statistics and sums are fp32. Products are fp32, tf32 or bf16 as the config says ("coarse"). Where softmax(S/τ) is not 0
and the rounding of a coarse product would change it, S is computed again from the fp32 operands ("fine"). A tile's
operands are read in chunks of BD dimensions, so what a tile needs of a chip does not grow with D. No kernel adds to
memory that another program writes: each writes its part and torch adds the parts in a fixed order.

Shapes: M tokens, K codes, D dimensions; BM, BK, BD are a tile's. Strides between rows are D, or K for weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Kernels take softmax(S/τ) below e^this for 0. fp32 has no normal number there, and chips differ in what they do with
# the others. `triton_passes` leaves out tiles that are below it as a whole.
LEAST_LOG = tl.constexpr(-87.0)
# Of a tile, in the map that `triton_passes` makes.
COARSE, FINE = tl.constexpr(1), tl.constexpr(2)


@triton.jit  # type: ignore[untyped-decorator]
def _rows(x, row, rows, start, D: tl.constexpr, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Dimensions start … start + BD of some rows; zeros beyond the edges. 64-bit addresses: 2^31 is 8M codes of 256."""
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
    """Σ eˣ and Σ eˣ x, with x measured from a reference that is −shift higher."""
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
    """Sums of each token over a split of the codes; weights (M, K) are e^(S − tile_top), tile_top (K/BK, M)."""
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
def _mix_kernel(  # type: ignore[no-untyped-def]
    c, tile_top, weights, top, mixed, M, K, codes_a_split, codes_a_top,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Σ e^(S − top) C over a split of the codes, from the weights of `_sums_kernel`; BK divides `codes_a_top`."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    split = tl.program_id(1)
    live = row < M
    row_top = tl.load(top + row, mask=live, other=0.0)
    mix = tl.zeros((BM, BD), tl.float32)
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
        mix = tl.dot(e, c_tile, mix, input_precision=PRECISION)
    places = mixed + (split.to(tl.int64) * M + row)[:, None] * D + d[None, :]
    tl.store(places, mix, mask=live[:, None] & (d < D)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _refine_kernel(  # type: ignore[no-untyped-def]
    z_fine, c_fine, active, index, top, second_index, second, total_tau, weighted, tile_top, M, K, codes_a_split, tiles,
    inv_tau,
    D: tl.constexpr, FINE_BD: tl.constexpr, FINE_PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The sums of S/τ and the two best codes again, from fine products of the tiles that `active` names."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    live = row < M
    best = tl.full((BM,), -float("inf"), tl.float32)
    next_best = tl.full((BM,), -float("inf"), tl.float32)
    best_index = tl.zeros((BM,), tl.int32)
    next_index = tl.zeros((BM,), tl.int32)
    sum_q = tl.zeros((BM,), tl.float32)
    sum_qx = tl.zeros((BM,), tl.float32)
    first = split * codes_a_split
    last = tl.minimum(first + codes_a_split, K)
    for start in range(first, last, BK):
        if tl.load(active + tl.program_id(0) * tiles + start // BK) != 0:
            code = start + tl.arange(0, BK)
            S = _product(z_fine, row, M, c_fine, code, last, D, FINE_BD, FINE_PRECISION, BM, BK)
            S = tl.where((code < last)[None, :], S, -float("inf"))
            here, place = _top(S, start)
            others = tl.where(code[None, :] == place[:, None], -float("inf"), S)
            here_second, second_place = _top(others, start)
            # Second is the loser of the two best, or the second of the winner's side.
            wins = here > best
            beaten, beaten_index = tl.where(wins, best, here), tl.where(wins, best_index, place)
            behind, behind_index = tl.where(wins, here_second, next_best), tl.where(wins, second_place, next_index)
            next_index = tl.where(behind > beaten, behind_index, beaten_index)
            next_best = tl.maximum(beaten, behind)
            best_index = tl.where(wins, place, best_index)
            new = tl.maximum(best, here)
            tl.store(tile_top + (start // BK) * M + row, here, mask=live)
            sum_q, sum_qx = _tau_sums(S, here, best, new, sum_q, sum_qx, inv_tau)
            best = new
    at = split * M + row
    tl.store(index + at, best_index, mask=live)
    tl.store(top + at, best, mask=live)
    tl.store(second_index + at, next_index, mask=live)
    tl.store(second + at, next_best, mask=live)
    tl.store(total_tau + at, sum_q, mask=live)
    tl.store(weighted + at, sum_qx, mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def _log_q(  # type: ignore[no-untyped-def]
    z, z_fine, row, rows, c, c_fine, code, codes, flag, top, log_sum_tau, inv_tau,
    D: tl.constexpr, BD: tl.constexpr, FINE_BD: tl.constexpr, PRECISION: tl.constexpr, FINE_PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """log softmax(S/τ) of a tile, fine where the flag says so."""
    if flag == FINE:
        S = _product(z_fine, row, rows, c_fine, code, codes, D, FINE_BD, FINE_PRECISION, BM, BK)
    else:
        S = _product(z, row, rows, c, code, codes, D, BD, PRECISION, BM, BK)
    return (S - top[:, None]) * inv_tau - log_sum_tau[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _means_kernel(  # type: ignore[no-untyped-def]
    z, c, z_fine, c_fine, active, top, log_sum_tau, mean, M, K, rows_a_split, tiles, inv_tau,
    D: tl.constexpr, BD: tl.constexpr, FINE_BD: tl.constexpr, PRECISION: tl.constexpr, FINE_PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Σ softmax(S/τ) of each code over a split of the tokens. Tiles that are not active are 0."""
    code = tl.program_id(0) * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    mean_sum = tl.zeros((BK,), tl.float32)
    first = split * rows_a_split
    last = tl.minimum(first + rows_a_split, M)
    for start in range(first, last, BM):
        flag = tl.load(active + (start // BM) * tiles + tl.program_id(0))
        if flag != 0:
            row = start + tl.arange(0, BM)
            live = row < last
            row_top = tl.load(top + row, mask=live, other=0.0)
            row_log = tl.load(log_sum_tau + row, mask=live, other=0.0)
            log_q = _log_q(
                z, z_fine, row, last, c, c_fine, code, K, flag, row_top, row_log, inv_tau,
                D, BD, FINE_BD, PRECISION, FINE_PRECISION, BM, BK,
            )  # fmt: skip
            q = tl.where(live[:, None] & (log_q > LEAST_LOG), tl.exp(log_q), 0.0)
            mean_sum += tl.sum(q, axis=0)
    tl.store(mean + split.to(tl.int64) * K + code, mean_sum, mask=code < K)


@triton.jit  # type: ignore[untyped-decorator]
def _pulled_kernel(  # type: ignore[no-untyped-def]
    z, c, z_fine, c_fine, active, top, log_sum_tau, batch, pulled, M, K, codes_a_split, tiles, inv_tau,
    D: tl.constexpr, BD: tl.constexpr, FINE_BD: tl.constexpr, PRECISION: tl.constexpr, FINE_PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Σ softmax(S/τ) r of each token over a split of the codes. Tiles that are not active are 0."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    live = row < M
    row_top = tl.load(top + row, mask=live, other=0.0)
    row_log = tl.load(log_sum_tau + row, mask=live, other=0.0)
    row_pulled = tl.zeros((BM,), tl.float32)
    first = split * codes_a_split
    last = tl.minimum(first + codes_a_split, K)
    for start in range(first, last, BK):
        flag = tl.load(active + tl.program_id(0) * tiles + start // BK)
        if flag != 0:
            code = start + tl.arange(0, BK)
            log_q = _log_q(
                z, z_fine, row, M, c, c_fine, code, last, flag, row_top, row_log, inv_tau,
                D, BD, FINE_BD, PRECISION, FINE_PRECISION, BM, BK,
            )  # fmt: skip
            r = tl.load(batch + code, mask=code < last, other=0.0)
            q = tl.where((code < last)[None, :] & (log_q > LEAST_LOG), tl.exp(log_q), 0.0)
            row_pulled += tl.sum(q * r[None, :], axis=1)
    tl.store(pulled + split * M + row, row_pulled, mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def _slopes_kernel(  # type: ignore[no-untyped-def]
    z, c, g, z_fine, c_fine, active, top, log_sum, log_sum_tau, entropy, sample, delta, pulled, batch, slopes,
    M, K, tiles, inv_tau,
    D: tl.constexpr, BD: tl.constexpr, FINE_BD: tl.constexpr, PRECISION: tl.constexpr, FINE_PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """∂L/∂S (M, K) of a tile (passes.py). Tokens go first, so that programs side by side read the same codes."""
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
    flag = tl.load(active + tl.program_id(0) * tiles + tl.program_id(1))
    if flag != 0:
        if flag == FINE:
            S = _product(z_fine, row, M, c_fine, code, K, D, FINE_BD, FINE_PRECISION, BM, BK)
        row_log_tau = tl.load(log_sum_tau + row, mask=live, other=0.0)
        row_entropy = tl.load(entropy + row, mask=live, other=0.0)
        row_sample = tl.load(sample + row, mask=live, other=0.0)
        row_pulled = tl.load(pulled + row, mask=live, other=0.0)
        r = tl.load(batch + code, mask=inside, other=0.0)
        log_q = (S - row_top[:, None]) * inv_tau - row_log_tau[:, None]
        inner = r[None, :] - row_pulled[:, None] - row_sample[:, None] * (log_q + row_entropy[:, None])
        dS += tl.where(log_q > LEAST_LOG, tl.exp(log_q) * inner * inv_tau, 0.0)
    places = slopes + row.to(tl.int64)[:, None] * K + code[None, :]
    tl.store(places, dS.to(slopes.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _best_kernel(  # type: ignore[no-untyped-def]
    z, c, offset, index, top, second, M, K, codes_a_split,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The best code of each token in a split of the codes, by S + offset, and the score of the second."""
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
        # The loser of the two tops, or a second: whichever is best.
        next_best = tl.maximum(tl.maximum(next_best, tl.max(others, axis=1)), tl.minimum(best, here))
        best_index = tl.where(here > best, place, best_index)
        best = tl.maximum(best, here)
    at = split * M + row
    tl.store(index + at, best_index, mask=row < M)
    tl.store(top + at, best, mask=row < M)
    tl.store(second + at, next_best, mask=row < M)
