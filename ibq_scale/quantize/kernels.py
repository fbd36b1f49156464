"""The passes as Triton kernels for CUDA devices: whole tiles of S stay on the chip.

Softmax statistics and sums are fp32; products are fp32, tf32 or bf16 as the config says. Every kernel writes the sums
of its part of the codes (or tokens) to a place of its own and torch adds the parts, so results are the same from run
to run: no atomics. Nothing here waits for the device, except the autotuner the first time it meets a shape.

Shapes in kernels: M tokens, K codes, D dimensions; BM, BK, BD are a tile's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibq_scale.quantize.passes import Backward, PartSums, RowStatistics, Segments, combine
from ibq_scale.quantize.product import Precision


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device and slowly. Decided when this module is imported."""
    return bool(triton.knobs.runtime.interpret)


# A split of the codes is a multiple of this many, so that any tile of the autotuner divides it.
SPLIT_UNIT = 128
# Waves of programs that a launch aims for, and the rows a program is counted with before the tuner has chosen.
WAVES, ROWS_A_PROGRAM = 2, 64
INTERPRETED_PROGRAMS = 6


@triton.jit  # type: ignore[untyped-decorator]
def _tile(x, row, rows, D: tl.constexpr, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a (rows, D) matrix; zeros beyond its edges. 64-bit addresses: 2^31 elements are 8M codes of 256."""
    d = tl.arange(0, BD)
    places = x + row.to(tl.int64)[:, None] * D + d[None, :]
    return tl.load(places, mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _store_tile(x, row, rows, value, D: tl.constexpr, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    d = tl.arange(0, BD)
    places = x + row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(places, value, mask=(row < rows)[:, None] & (d < D)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _sums_kernel(  # type: ignore[no-untyped-def]
    z, c, index, top, total, total_tau, weighted, mixed, M, K, codes_a_split, inv_tau, M_bucket,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    z_tile = _tile(z, row, M, D, BD)
    best = tl.full((BM,), -float("inf"), tl.float32)
    best_index = tl.zeros((BM,), tl.int32)
    sum_p = tl.zeros((BM,), tl.float32)
    sum_q = tl.zeros((BM,), tl.float32)
    sum_qx = tl.zeros((BM,), tl.float32)
    mix = tl.zeros((BM, BD), tl.float32)
    first = split * codes_a_split
    last = tl.minimum(first + codes_a_split, K)
    for start in range(first, last, BK):
        code = start + tl.arange(0, BK)
        c_tile = _tile(c, code, last, D, BD)
        S = tl.dot(z_tile, tl.trans(c_tile), input_precision=PRECISION)
        S = tl.where((code < last)[None, :], S, -float("inf"))
        tile_top, place = tl.max(S, axis=1, return_indices=True, return_indices_tie_break_left=True)
        best_index = tl.where(tile_top > best, start + place, best_index)
        new = tl.maximum(best, tile_top)
        # No earlier sum has nothing to rescale; −∞ times it would be NaN.
        shift = tl.where(best == -float("inf"), 0.0, best - new)
        scale = tl.exp(shift)
        x = S - new[:, None]
        e = tl.exp(x)
        mix = mix * scale[:, None] + tl.dot(e.to(c_tile.dtype), c_tile, input_precision=PRECISION)
        sum_p = sum_p * scale + tl.sum(e, axis=1)
        shift_tau = shift * inv_tau
        scale_tau = tl.exp(shift_tau)
        x_tau = x * inv_tau
        e_tau = tl.exp(x_tau)
        # Beyond the last code it is 0 · −∞.
        weighted_tau = tl.where(e_tau > 0, e_tau * x_tau, 0.0)
        sum_qx = scale_tau * (sum_qx + shift_tau * sum_q) + tl.sum(weighted_tau, axis=1)
        sum_q = sum_q * scale_tau + tl.sum(e_tau, axis=1)
        best = new
    at = split * M + row
    tl.store(index + at, best_index, mask=row < M)
    tl.store(top + at, best, mask=row < M)
    tl.store(total + at, sum_p, mask=row < M)
    tl.store(total_tau + at, sum_q, mask=row < M)
    tl.store(weighted + at, sum_qx, mask=row < M)
    _store_tile(mixed + split.to(tl.int64) * M * D, row, M, mix, D, BD)


@triton.jit  # type: ignore[untyped-decorator]
def _means_kernel(  # type: ignore[no-untyped-def]
    z, c, top, log_sum_tau, mean, M, K, rows_a_split, inv_tau, M_bucket,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    code = tl.program_id(0) * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    c_tile = _tile(c, code, K, D, BD)
    mean_sum = tl.zeros((BK,), tl.float32)
    first = split * rows_a_split
    last = tl.minimum(first + rows_a_split, M)
    for start in range(first, last, BM):
        row = start + tl.arange(0, BM)
        live = row < last
        z_tile = _tile(z, row, last, D, BD)
        S = tl.dot(c_tile, tl.trans(z_tile), input_precision=PRECISION)
        row_top = tl.load(top + row, mask=live, other=0.0)
        row_log = tl.load(log_sum_tau + row, mask=live, other=0.0)
        q = tl.exp((S - row_top[None, :]) * inv_tau - row_log[None, :])
        mean_sum += tl.sum(tl.where(live[None, :], q, 0.0), axis=1)
    tl.store(mean + split.to(tl.int64) * K + code, mean_sum, mask=code < K)


@triton.jit  # type: ignore[untyped-decorator]
def _pulled_kernel(  # type: ignore[no-untyped-def]
    z, c, top, log_sum_tau, batch, pulled, M, K, codes_a_split, inv_tau, M_bucket,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    z_tile = _tile(z, row, M, D, BD)
    row_top = tl.load(top + row, mask=row < M, other=0.0)
    row_log = tl.load(log_sum_tau + row, mask=row < M, other=0.0)
    row_pulled = tl.zeros((BM,), tl.float32)
    first = split * codes_a_split
    last = tl.minimum(first + codes_a_split, K)
    for start in range(first, last, BK):
        code = start + tl.arange(0, BK)
        c_tile = _tile(c, code, last, D, BD)
        S = tl.dot(z_tile, tl.trans(c_tile), input_precision=PRECISION)
        q = tl.exp((S - row_top[:, None]) * inv_tau - row_log[:, None])
        # Codes beyond the last have no pull, whatever their q.
        r = tl.load(batch + code, mask=code < last, other=0.0)
        row_pulled += tl.sum(tl.where((code < last)[None, :], q * r[None, :], 0.0), axis=1)
    tl.store(pulled + split * M + row, row_pulled, mask=row < M)


@triton.jit
def _grad_scores(  # type: ignore[no-untyped-def]
    S, G, top, log_sum, log_sum_tau, entropy, sample, delta, pulled, r, inv_tau
):
    """∂L/∂S of a tile (passes.py); the vectors come broadcast to its axes."""
    x = S - top
    p = tl.exp(x - log_sum)
    log_q = x * inv_tau - log_sum_tau
    q = tl.exp(log_q)
    inner = r - pulled - sample * (log_q + entropy)
    return p * (G - delta) + tl.where(q > 0, q * inner * inv_tau, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _grad_z_kernel(  # type: ignore[no-untyped-def]
    z, c, g, top, log_sum, log_sum_tau, entropy, sample, delta, pulled, batch, grad_z,
    M, K, codes_a_split, inv_tau, M_bucket,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    alive = row < M
    z_tile = _tile(z, row, M, D, BD)
    g_tile = _tile(g, row, M, D, BD)
    row_top = tl.load(top + row, mask=alive, other=0.0)
    row_log = tl.load(log_sum + row, mask=alive, other=0.0)
    row_log_tau = tl.load(log_sum_tau + row, mask=alive, other=0.0)
    row_entropy = tl.load(entropy + row, mask=alive, other=0.0)
    row_sample = tl.load(sample + row, mask=alive, other=0.0)
    row_delta = tl.load(delta + row, mask=alive, other=0.0)
    row_pulled = tl.load(pulled + row, mask=alive, other=0.0)
    grad = tl.zeros((BM, BD), tl.float32)
    first = split * codes_a_split
    last = tl.minimum(first + codes_a_split, K)
    for start in range(first, last, BK):
        code = start + tl.arange(0, BK)
        live = code < last
        c_tile = _tile(c, code, last, D, BD)
        S = tl.dot(z_tile, tl.trans(c_tile), input_precision=PRECISION)
        G = tl.dot(g_tile, tl.trans(c_tile), input_precision=PRECISION)
        r = tl.load(batch + code, mask=live, other=0.0)
        dS = _grad_scores(
            S, G, row_top[:, None], row_log[:, None], row_log_tau[:, None], row_entropy[:, None],
            row_sample[:, None], row_delta[:, None], row_pulled[:, None], r[None, :], inv_tau,
        )  # fmt: skip
        dS = tl.where(live[None, :], dS, 0.0)
        grad += tl.dot(dS.to(c_tile.dtype), c_tile, input_precision=PRECISION)
    _store_tile(grad_z + split.to(tl.int64) * M * D, row, M, grad, D, BD)


@triton.jit  # type: ignore[untyped-decorator]
def _grad_rows_kernel(  # type: ignore[no-untyped-def]
    z, c, g, top, log_sum, log_sum_tau, entropy, sample, delta, pulled, batch, grad_rows,
    M, K, rows_a_split, inv_tau, M_bucket,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    code = tl.program_id(0) * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    c_tile = _tile(c, code, K, D, BD)
    r = tl.load(batch + code, mask=code < K, other=0.0)
    grad = tl.zeros((BK, BD), tl.float32)
    first = split * rows_a_split
    last = tl.minimum(first + rows_a_split, M)
    for start in range(first, last, BM):
        row = start + tl.arange(0, BM)
        live = row < last
        z_tile = _tile(z, row, last, D, BD)
        g_tile = _tile(g, row, last, D, BD)
        S = tl.dot(c_tile, tl.trans(z_tile), input_precision=PRECISION)
        G = tl.dot(c_tile, tl.trans(g_tile), input_precision=PRECISION)
        row_top = tl.load(top + row, mask=live, other=0.0)
        row_log = tl.load(log_sum + row, mask=live, other=0.0)
        row_log_tau = tl.load(log_sum_tau + row, mask=live, other=0.0)
        row_entropy = tl.load(entropy + row, mask=live, other=0.0)
        row_sample = tl.load(sample + row, mask=live, other=0.0)
        row_delta = tl.load(delta + row, mask=live, other=0.0)
        row_pulled = tl.load(pulled + row, mask=live, other=0.0)
        dS = _grad_scores(
            S, G, row_top[None, :], row_log[None, :], row_log_tau[None, :], row_entropy[None, :],
            row_sample[None, :], row_delta[None, :], row_pulled[None, :], r[:, None], inv_tau,
        )  # fmt: skip
        dS = tl.where(live[None, :], dS, 0.0)
        grad += tl.dot(dS.to(z_tile.dtype), z_tile, input_precision=PRECISION)
    _store_tile(grad_rows + split.to(tl.int64) * K * D, code, K, grad, D, BD)


@triton.jit  # type: ignore[untyped-decorator]
def _best_kernel(  # type: ignore[no-untyped-def]
    z, c, offset, index, top, second, M, K, codes_a_split, M_bucket,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    z_tile = _tile(z, row, M, D, BD)
    best = tl.full((BM,), -float("inf"), tl.float32)
    next_best = tl.full((BM,), -float("inf"), tl.float32)
    best_index = tl.zeros((BM,), tl.int32)
    first = split * codes_a_split
    last = tl.minimum(first + codes_a_split, K)
    for start in range(first, last, BK):
        code = start + tl.arange(0, BK)
        live = code < last
        c_tile = _tile(c, code, last, D, BD)
        S = tl.dot(z_tile, tl.trans(c_tile), input_precision=PRECISION)
        S += tl.load(offset + code, mask=live, other=0.0)[None, :]
        S = tl.where(live[None, :], S, -float("inf"))
        tile_top, place = tl.max(S, axis=1, return_indices=True, return_indices_tie_break_left=True)
        others = tl.where(tl.arange(0, BK)[None, :] == place[:, None], -float("inf"), S)
        tile_second = tl.max(others, axis=1)
        # The loser of the two tops, or a second: whichever is best.
        next_best = tl.maximum(tl.maximum(next_best, tile_second), tl.minimum(best, tile_top))
        best_index = tl.where(tile_top > best, start + place, best_index)
        best = tl.maximum(best, tile_top)
    at = split * M + row
    tl.store(index + at, best_index, mask=row < M)
    tl.store(top + at, best, mask=row < M)
    tl.store(second + at, next_best, mask=row < M)


_TILES = [(64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (32, 64, 4, 3)]
_INTERPRETED_TILE = {"BM": 16, "BK": 16}


def _tuned(kernel: Any) -> Callable[..., None]:
    """`launch(grid, *arguments, **constants)`: the kernel under the autotuner, or as it is in the interpreter.

    `grid` takes the chosen tile {"BM": …, "BK": …}.
    """
    if interpreted():

        def launch(grid: Any, *arguments: Any, **constants: Any) -> None:
            kernel[grid(_INTERPRETED_TILE)](*arguments, **constants, **_INTERPRETED_TILE)

        return launch
    configs = [
        triton.Config({"BM": bm, "BK": bk}, num_warps=warps, num_stages=stages) for bm, bk, warps, stages in _TILES
    ]
    tuned = triton.autotune(configs, key=["M_bucket", "K", "D", "PRECISION"])(kernel)

    def launch_tuned(grid: Any, *arguments: Any, **constants: Any) -> None:
        tuned[grid](*arguments, **constants)

    return launch_tuned


_sums, _means, _pulled = _tuned(_sums_kernel), _tuned(_means_kernel), _tuned(_pulled_kernel)
_grad_z, _grad_rows, _best = _tuned(_grad_z_kernel), _tuned(_grad_rows_kernel), _tuned(_best_kernel)


class _Split(NamedTuple):
    """`parts` parts of `size` (the last may be smaller) of a loop, so that a launch fills the device."""

    parts: int
    size: int

    @staticmethod
    def of(length: int, programs: int, device: torch.device) -> _Split:
        wanted = INTERPRETED_PROGRAMS
        if device.type == "cuda":
            wanted = WAVES * torch.cuda.get_device_properties(device).multi_processor_count
        unit = SPLIT_UNIT if device.type == "cuda" else _INTERPRETED_TILE["BK"]
        wished = max(1, min(wanted // programs, triton.cdiv(length, 4 * unit)))
        size = triton.cdiv(triton.cdiv(length, wished), unit) * unit
        return _Split(triton.cdiv(length, size), size)


class TritonPasses:
    """See `passes.Passes`."""

    def __init__(self, temperature: float, precision: Precision) -> None:
        self.temperature = temperature
        self.precision = precision

    def sums(self, z_MD: Tensor, rows_KD: Tensor) -> PartSums:
        M, (K, D) = len(z_MD), rows_KD.shape
        split = _code_split(M, K, z_MD.device)
        index = z_MD.new_empty((split.parts, M), dtype=torch.int32)
        top, total, total_tau, weighted = (z_MD.new_empty((split.parts, M)) for _ in range(4))
        parts_SMD = z_MD.new_empty((split.parts, M, D))
        _sums(
            lambda tile: (triton.cdiv(M, tile["BM"]), split.parts),
            self._operand(z_MD), self._operand(rows_KD), index, top, total, total_tau, weighted, parts_SMD,
            M, K, split.size, 1.0 / self.temperature, _bucket(M),
            **self._constants(D),
        )  # fmt: skip
        parts = [
            PartSums(*columns) for columns in zip(index.long(), top, total, total_tau, weighted, parts_SMD, strict=True)
        ]
        return parts[0] if split.parts == 1 else combine(parts, [0] * split.parts, self.temperature)

    def means(self, z_MD: Tensor, rows_KD: Tensor, statistics: RowStatistics, segments: Segments) -> Tensor:
        K, D = rows_KD.shape
        z, rows = self._operand(z_MD), self._operand(rows_KD)
        mean_GK = z_MD.new_empty((len(segments), K))
        for number, segment in enumerate(segments):
            M = segment.stop - segment.start
            split = _row_split(M, K, z_MD.device)
            parts_SK = z_MD.new_empty((split.parts, K))
            _means(
                lambda tile, split=split: (triton.cdiv(K, tile["BK"]), split.parts),
                z[segment], rows, statistics.top[segment], statistics.log_sum_tau[segment], parts_SK,
                M, K, split.size, 1.0 / self.temperature, _bucket(M),
                **self._constants(D),
            )  # fmt: skip
            mean_GK[number] = parts_SK.sum(dim=0)
        return mean_GK

    def pulled(self, job: Backward) -> Tensor:
        assert job.pull.batch_GK is not None
        K, D = job.rows_KD.shape
        z, rows = self._operand(job.z_MD), self._operand(job.rows_KD)
        pulled_M = torch.empty_like(job.statistics.top)
        for number, segment in enumerate(job.segments):
            M = segment.stop - segment.start
            split = _code_split(M, K, z.device)
            parts_SM = job.z_MD.new_empty((split.parts, M))
            _pulled(
                lambda tile, M=M, split=split: (triton.cdiv(M, tile["BM"]), split.parts),
                z[segment], rows, job.statistics.top[segment], job.statistics.log_sum_tau[segment],
                job.pull.batch_GK[number], parts_SM, M, K, split.size, 1.0 / self.temperature, _bucket(M),
                **self._constants(D),
            )  # fmt: skip
            pulled_M[segment] = parts_SM.sum(dim=0)
        return pulled_M

    def gradients(self, job: Backward) -> tuple[Tensor, Tensor]:
        assert job.delta_M is not None
        z, rows, g = self._operand(job.z_MD), self._operand(job.rows_KD), self._operand(job.g_MD)
        grad_z_MD, grad_rows_KD = torch.empty_like(job.z_MD), torch.empty_like(job.rows_KD)
        nothing_K, nothing_M = rows.new_zeros(len(rows), dtype=torch.float32), torch.zeros_like(job.delta_M)
        pulled_M = nothing_M if job.pulled_M is None else job.pulled_M
        for number, segment in enumerate(job.segments):
            batch_K = nothing_K if job.pull.batch_GK is None else job.pull.batch_GK[number]
            s = job.statistics.rows(segment)
            sample_M = job.pull.sample_M[segment].contiguous()
            of_rows = (s.top, s.log_sum, s.log_sum_tau, s.entropy, sample_M, job.delta_M[segment], pulled_M[segment])
            vectors = (*of_rows, batch_K)
            self._grad_z(z[segment], rows, g[segment], vectors, grad_z_MD[segment])
            self._grad_rows(z[segment], rows, g[segment], vectors, grad_rows_KD, first=number == 0)
        return grad_z_MD, grad_rows_KD

    def _grad_z(self, z: Tensor, rows: Tensor, g: Tensor, vectors: tuple[Tensor, ...], out_MD: Tensor) -> None:
        M, (K, D) = len(z), rows.shape
        split = _code_split(M, K, z.device)
        parts_SMD = out_MD.new_empty((split.parts, M, D))
        _grad_z(
            lambda tile: (triton.cdiv(M, tile["BM"]), split.parts),
            z, rows, g, *vectors, parts_SMD, M, K, split.size, 1.0 / self.temperature, _bucket(M),
            **self._constants(D),
        )  # fmt: skip
        torch.sum(parts_SMD, dim=0, out=out_MD)

    def _grad_rows(
        self, z: Tensor, rows: Tensor, g: Tensor, vectors: tuple[Tensor, ...], out_KD: Tensor, *, first: bool
    ) -> None:
        M, (K, D) = len(z), rows.shape
        split = _row_split(M, K, z.device)
        # The usual case, a large codebook, fills the device without a split and needs no second buffer.
        direct = first and split.parts == 1
        parts_SKD = out_KD[None] if direct else out_KD.new_empty((split.parts, K, D))
        _grad_rows(
            lambda tile: (triton.cdiv(K, tile["BK"]), split.parts),
            z, rows, g, *vectors, parts_SKD, M, K, split.size, 1.0 / self.temperature, _bucket(M),
            **self._constants(D),
        )  # fmt: skip
        if first and not direct:
            torch.sum(parts_SKD, dim=0, out=out_KD)
        elif not first:
            out_KD += parts_SKD.sum(dim=0)

    def _operand(self, x: Tensor) -> Tensor:
        """fp32, or rounded to bf16; the interpreter multiplies no bf16 and gets the rounded values as fp32."""
        x = x.contiguous()
        if self.precision != "bf16":
            return x
        return x.bfloat16().float() if interpreted() else x.bfloat16()

    def _constants(self, dim: int) -> dict[str, Any]:
        return _constants(dim, self.precision)


def best_and_second(
    z_MD: Tensor, rows_KD: Tensor, offset_K: Tensor | None, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each part s of the codes: the best code's index int64 (S, M), its score, and the second best score.

    Scores are z·c (+ offset) in the given precision; the second is −∞ in a part of one code.
    """
    M, (K, D) = len(z_MD), rows_KD.shape
    passes = TritonPasses(1.0, precision)
    split = _code_split(M, K, z_MD.device)
    index = z_MD.new_empty((split.parts, M), dtype=torch.int32)
    top, second = (z_MD.new_empty((split.parts, M)) for _ in range(2))
    offset_K = z_MD.new_zeros(K) if offset_K is None else offset_K
    _best(
        lambda tile: (triton.cdiv(M, tile["BM"]), split.parts),
        passes._operand(z_MD), passes._operand(rows_KD), offset_K, index, top, second,
        M, K, split.size, _bucket(M),
        **_constants(D, precision),
    )  # fmt: skip
    return index.long(), top, second


def _constants(dim: int, precision: Precision) -> dict[str, Any]:
    name = "tf32" if precision == "tf32" else "ieee"
    return {"D": dim, "BD": max(16, triton.next_power_of_2(dim)), "PRECISION": name}


def _code_split(tokens: int, codes: int, device: torch.device) -> _Split:
    return _Split.of(codes, triton.cdiv(tokens, ROWS_A_PROGRAM), device)


def _row_split(tokens: int, codes: int, device: torch.device) -> _Split:
    return _Split.of(tokens, triton.cdiv(codes, ROWS_A_PROGRAM), device)


def _bucket(tokens: int) -> int:
    """The tuner chooses anew for each power of two, not for each batch."""
    return int(triton.next_power_of_2(tokens))
