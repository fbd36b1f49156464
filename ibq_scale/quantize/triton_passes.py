"""The passes by the Triton kernels (kernels.py), and cuBLAS for the two products of the backward pass.

Products of N·K·D: S and e C for the sums, S and g Cᵀ for ∂L/∂S, and ∂L/∂S C and ∂L/∂Sᵀ z of it: 6. What softmax(S/τ)
needs beside them is done on *active* tiles only, where it is not 0 in fp32: S for q̄ and S for π. A coarse product is
off by up to `_error`, many nats of S/τ. So where that matters S is computed again by fine products, and the code of a
token is the best by them, the best two weighed in fp64.

A step's blocks of e^S and of ∂L/∂S, (M, codes of a block), hold at most `BLOCK_BYTES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_scale.quantize.passes import Backward, Codes, PartSums, RowStatistics, Scored, Segments, combine
from ibq_scale.quantize.product import Precision, product_into
from ibq_scale.quantize.tiles import Tile, chosen, constants, interpreted, run

# Waves of programs that a launch aims for. A split of the codes is a multiple of so many: any tile divides it.
WAVES, SPLIT_UNIT = 2, 128
INTERPRETED_PROGRAMS, INTERPRETED_UNIT = 6, 16
BLOCK_BYTES = 512 << 20
BLOCK_UNIT = 1024
# Tokens × codes of a field of the map of active tiles; every tile is a multiple of it.
FIELD = 64
# Rounding of an operand: to nearest in bf16, cut off in tf32.
OPERAND = {"fp32": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-8}
# Fine where the bound on the error of S/τ is larger, in nats. The error itself is about a fiftieth of it.
FINE_FROM = 1.0
# Below e^LEAST softmax(S/τ) is 0 in every kernel; a nat is left for sums in another order.
LEAST = -87.0
# Of exponents whose exp is not to overflow.
LARGEST = 80.0


def field() -> int:
    """Tokens, and codes, of a field of the map."""
    return INTERPRETED_UNIT if interpreted() else FIELD


class _Split(NamedTuple):
    """`parts` parts of `size` (the last may be smaller) of a loop, so that a launch fills the device."""

    parts: int
    size: int

    @staticmethod
    def of(length: int, programs: int, device: torch.device) -> _Split:
        wanted, unit = INTERPRETED_PROGRAMS, INTERPRETED_UNIT
        if not interpreted():
            wanted, unit = WAVES * torch.cuda.get_device_properties(device).multi_processor_count, SPLIT_UNIT
        wished = max(1, min(wanted // programs, _blocks(length, 4 * unit)))
        size = _blocks(_blocks(length, wished), unit) * unit
        return _Split(_blocks(length, size), size)


class TritonPasses:
    """See `passes.Passes`."""

    def __init__(self, temperature: float, precision: Precision) -> None:
        self.temperature = temperature
        self.precision = precision

    def coarse(self, rows_KD: Tensor) -> Tensor:
        if self.precision != "bf16":
            return rows_KD.new_empty((0, rows_KD.shape[1]))
        # The interpreter multiplies no bf16 and gets the rounded values as fp32.
        narrow = rows_KD.bfloat16()
        return narrow.float() if interpreted() else narrow

    def sums(self, z_MD: Tensor, codes: Codes) -> tuple[PartSums, Scored]:
        M, K = len(z_MD), len(codes.rows_KD)
        z, c = self._operand(z_MD), codes.operand
        tile = self._tile("sums", z)
        block = self._block(M, z)
        parts, tops = zip(*(self._sums(tile, z, c[at : at + block]) for at in range(0, K, block)), strict=True)
        sums = combine(list(parts), list(range(0, K, block)), self.temperature)
        scored = Scored(torch.cat(tops), tile.codes, torch.zeros_like(sums.top, dtype=torch.bool), None, 0)
        return (sums, scored) if self.precision == "fp32" else self._refined(z_MD, codes.rows_KD, sums, scored)

    def _sums(self, tile: Tile, z: Tensor, c: Tensor) -> tuple[PartSums, Tensor]:
        """Of a block of codes; and each token's best score in each tile of codes (T, M)."""
        (M, D), K = z.shape, len(c)
        split = _Split.of(K, _blocks(M, tile.tokens), z.device)
        index = torch.empty((split.parts, M), dtype=torch.int32, device=z.device)
        top, total, total_tau, weighted = _floats(z, 4, split.parts, M)
        (tile_top,) = _floats(z, 1, _blocks(K, tile.codes), M)
        weights_MK = z.new_empty((M, K))
        run("sums", tile, (_blocks(M, tile.tokens), split.parts), self._constants("sums", tile, D),
            z, c, index, top, total, total_tau, weighted, tile_top, weights_MK, M, K, split.size,
            1.0 / self.temperature)  # fmt: skip
        columns = zip(index.long(), top, total, total_tau, weighted, strict=True)
        sums = combine([PartSums(*column, None) for column in columns], [0] * split.parts, self.temperature)
        return replace(sums, mixed_MD=self._mixed(tile, c, sums.top, tile_top, weights_MK)), tile_top

    def _mixed(self, of_sums: Tile, c: Tensor, top: Tensor, tile_top: Tensor, weights_MK: Tensor) -> Tensor:
        (M, K), D = weights_MK.shape, c.shape[1]
        tile = self._tile("mix", c, most_codes=of_sums.codes)
        columns = _blocks(D, tile.dims)
        split = _Split.of(K, _blocks(M, tile.tokens) * columns, c.device)
        (parts_SMD,) = _floats(c, 1, split.parts, M, D)
        run("mix", tile, (_blocks(M, tile.tokens), split.parts, columns), self._constants("mix", tile, D),
            c, tile_top, weights_MK, top, parts_SMD, M, K, split.size, of_sums.codes)  # fmt: skip
        return parts_SMD.sum(dim=0)

    def _refined(self, z_MD: Tensor, rows_KD: Tensor, sums: PartSums, scored: Scored) -> tuple[PartSums, Scored]:
        """The sums with the codes by fine products, and with S/τ by them where its coarse error matters."""
        (M, D), K = z_MD.shape, len(rows_KD)
        tile = self._tile("refine", z_MD)
        error_TM = self._error(z_MD, rows_KD, scored.codes)
        fine_M = error_TM.amax(dim=0) > FINE_FROM * self.temperature
        least_M = (scored.top_TM - error_TM).amax(dim=0) + torch.where(fine_M, (LEAST - 1) * self.temperature, 0.0)
        possible_TM = scored.top_TM + error_TM >= least_M
        active = _fields(possible_TM, scored.codes, (slice(0, M),), tile.tokens, tile.codes)
        split = _Split.of(K, _blocks(M, tile.tokens), z_MD.device)
        index, second_index = torch.empty((2, split.parts, M), dtype=torch.int32, device=z_MD.device)
        top, second, total_tau, weighted = _floats(z_MD, 4, split.parts, M)
        fine_top_TM = torch.full((_blocks(K, tile.codes), M), -torch.inf, device=z_MD.device)
        run("refine", tile, (_blocks(M, tile.tokens), split.parts), self._constants("refine", tile, D),
            z_MD, rows_KD, active, index, top, second_index, second, total_tau, weighted, fine_top_TM, M, K, split.size,
            active.shape[1], 1.0 / self.temperature)  # fmt: skip
        columns = zip(index.long(), top, torch.zeros_like(top), total_tau, weighted, strict=True)
        fine = combine([PartSums(*column, None) for column in columns], [0] * split.parts, self.temperature)
        others = torch.where(index == fine.index, -torch.inf, top)
        second, place = torch.cat([others, second]).max(dim=0)
        second_index = torch.cat([index, second_index]).long().gather(0, place[None])[0]
        best, best_top = _better(z_MD, rows_KD, fine.index, torch.where(second > -torch.inf, second_index, fine.index))
        # The coarse sums of S/τ stay where they are good enough. Both are measured from the score of the code taken.
        coarse, fine = (_from(part, best_top, self.temperature) for part in (sums, fine))
        joined = replace(
            coarse,
            index=best,
            total_tau=torch.where(fine_M, fine.total_tau, coarse.total_tau),
            weighted=torch.where(fine_M, fine.weighted, coarse.weighted),
        )
        return joined, scored._replace(fine_M=fine_M, fine_top_TM=fine_top_TM, fine_codes=tile.codes)

    def active(self, scored: Scored | None, statistics: RowStatistics, segments: Segments) -> Tensor:
        assert scored is not None
        least_M = statistics.top + self.temperature * (statistics.log_sum_tau + LEAST - 1)
        fields = (segments, field(), field())
        found_UT = _fields((scored.top_TM >= least_M) & ~scored.fine_M, scored.codes, *fields)
        if scored.fine_top_TM is None:
            return found_UT
        found_UT |= _fields((scored.fine_top_TM >= least_M) & scored.fine_M, scored.fine_codes, *fields)
        # A field with one token that needs it is fine as a whole.
        fine_U1 = _fields(scored.fine_M[None], 1, segments, field(), 1)
        return found_UT << fine_U1

    def fields(self, sizes: Sequence[int], codes: int) -> tuple[int, int]:
        return sum(_blocks(size, field()) for size in sizes), _blocks(codes, field())

    def means(
        self, z_MD: Tensor, codes: Codes, statistics: RowStatistics, segments: Segments, active_UT: Tensor
    ) -> Tensor:
        K, D = codes.rows_KD.shape
        z, c = self._operand(z_MD), codes.operand
        mean_GK = z_MD.new_empty((len(segments), K))
        for number, (segment, fields_UT) in enumerate(_by_segment(segments, active_UT)):
            M = segment.stop - segment.start
            tile = self._tile("means", z)
            active = _pooled(fields_UT, tile)
            split = _Split.of(M, _blocks(K, tile.codes), z.device)
            (parts_SK,) = _floats(z, 1, split.parts, K)
            run("means", tile, (_blocks(K, tile.codes), split.parts), self._constants("means", tile, D),
                z[segment], c, z_MD[segment], codes.rows_KD, active, statistics.top[segment],
                statistics.log_sum_tau[segment], parts_SK, M, K, split.size, active.shape[1],
                1.0 / self.temperature)  # fmt: skip
            mean_GK[number] = parts_SK.sum(dim=0)
        return mean_GK

    def pulled(self, job: Backward) -> Tensor:
        assert job.pull.batch_GK is not None
        K, D = job.codes.rows_KD.shape
        z, c = self._operand(job.z_MD), job.codes.operand
        pulled_M = torch.empty_like(job.statistics.top)
        for number, (segment, fields_UT) in enumerate(_by_segment(job.segments, job.active_UT)):
            M = segment.stop - segment.start
            tile = self._tile("pulled", z)
            active = _pooled(fields_UT, tile)
            split = _Split.of(K, _blocks(M, tile.tokens), z.device)
            (parts_SM,) = _floats(z, 1, split.parts, M)
            rows = job.statistics.rows(segment)
            run("pulled", tile, (_blocks(M, tile.tokens), split.parts), self._constants("pulled", tile, D),
                z[segment], c, job.z_MD[segment], job.codes.rows_KD, active, rows.top, rows.log_sum_tau,
                job.pull.batch_GK[number], parts_SM, M, K, split.size, active.shape[1],
                1.0 / self.temperature)  # fmt: skip
            pulled_M[segment] = parts_SM.sum(dim=0)
        return pulled_M

    def gradients(self, job: Backward) -> tuple[Tensor, Tensor]:
        assert job.delta_M is not None
        K = len(job.codes.rows_KD)
        z, g, c = self._operand(job.z_MD), self._operand(job.g_MD), job.codes.operand
        grad_z_MD, grad_rows_KD = torch.empty_like(job.z_MD), torch.empty_like(job.codes.rows_KD)
        pulled_M = torch.zeros_like(job.delta_M) if job.pulled_M is None else job.pulled_M
        nothing_K = torch.zeros_like(grad_rows_KD[:, 0])
        for number, (segment, fields_UT) in enumerate(_by_segment(job.segments, job.active_UT)):
            batch_K = nothing_K if job.pull.batch_GK is None else job.pull.batch_GK[number]
            s = job.statistics.rows(segment)
            sample_M = job.pull.sample_M[segment].contiguous()
            vectors = (s.top, s.log_sum, s.log_sum_tau, s.entropy, sample_M, job.delta_M[segment], pulled_M[segment])
            block = self._block(segment.stop - segment.start, z)
            for first in range(0, K, block):
                part = slice(first, min(first + block, K))
                dS_MK = self._slopes(job, segment, part, (z, g, c), fields_UT, (*vectors, batch_K[part]))
                product_into(grad_z_MD[segment], dS_MK, c[part], self.precision, accumulate=first > 0)
                product_into(grad_rows_KD[part], dS_MK.T, z[segment], self.precision, accumulate=number > 0)
        return grad_z_MD, grad_rows_KD

    def _slopes(
        self, job: Backward, segment: slice, part: slice, operands: tuple[Tensor, ...], fields_UT: Tensor,
        vectors: tuple[Tensor, ...],
    ) -> Tensor:  # fmt: skip
        """∂L/∂S (M, K) of a segment and a block of codes."""
        z, g, c = operands
        M, K, D = segment.stop - segment.start, part.stop - part.start, z.shape[1]
        tile = self._tile("slopes", z)
        active = _pooled(fields_UT[:, part.start // field() : _blocks(part.stop, field())], tile)
        dS_MK = z.new_empty((M, K))
        run("slopes", tile, (_blocks(M, tile.tokens), _blocks(K, tile.codes)), self._constants("slopes", tile, D),
            z[segment], c[part], g[segment], job.z_MD[segment], job.codes.rows_KD[part], active, *vectors, dS_MK,
            M, K, active.shape[1], 1.0 / self.temperature)  # fmt: skip
        return dS_MK

    def _error(self, z_MD: Tensor, rows_KD: Tensor, codes: int) -> Tensor:
        """Bound (T, M) on the error of coarse scores, in each tile of so many codes: see search.py."""
        norm_K = torch.linalg.vector_norm(rows_KD, dim=1)
        norm_T = F.pad(norm_K, (0, -len(norm_K) % codes)).view(-1, codes).amax(dim=1)
        rounding = (rows_KD.shape[1] + 1) * torch.finfo(torch.float32).eps
        gamma, operand = rounding / (1 - rounding), OPERAND[self.precision]
        size_TM: Tensor = norm_T[:, None] * torch.linalg.vector_norm(z_MD, dim=1)
        share = (gamma + (2 * operand + operand**2) * (1 + gamma)) * (1 + 2 * rounding)
        return size_TM * share

    def _operand(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        narrow = self.coarse(x)
        return narrow if len(narrow) else x

    def _tile(self, kernel: str, like: Tensor, most_codes: int = 1 << 30) -> Tile:
        return chosen(kernel, self.precision, like.shape[1], like.device, most_codes)

    def _constants(self, kernel: str, tile: Tile, dim: int) -> dict[str, Any]:
        return constants(kernel, tile, dim, self.precision)

    def _block(self, tokens: int, like: Tensor) -> int:
        """Codes of a block."""
        return max(1, BLOCK_BYTES // (tokens * like.element_size()) // BLOCK_UNIT) * BLOCK_UNIT


def best_and_second(
    z_MD: Tensor, rows_KD: Tensor, offset_K: Tensor | None, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each part s of the codes: the best code's index int64 (S, M), its score, and the second best score.

    Scores are z·c (+ offset) in the given precision; the second is −∞ in a part of one code.
    """
    M, (K, D) = len(z_MD), rows_KD.shape
    passes = TritonPasses(1.0, precision)
    tile = passes._tile("best", z_MD)
    split = _Split.of(K, _blocks(M, tile.tokens), z_MD.device)
    index = torch.empty((split.parts, M), dtype=torch.int32, device=z_MD.device)
    top, second = _floats(z_MD, 2, split.parts, M)
    offset_K = z_MD.new_zeros(K) if offset_K is None else offset_K
    run("best", tile, (_blocks(M, tile.tokens), split.parts), passes._constants("best", tile, D),
        passes._operand(z_MD), passes._operand(rows_KD), offset_K, index, top, second, M, K, split.size)  # fmt: skip
    return index.long(), top, second


def _from(sums: PartSums, top: Tensor, temperature: float) -> PartSums:
    """The same sums, measured from another score than their own maximum."""
    shift = sums.top - top
    # Where bf16 is off by more than fp32's exponents hold, nothing but the code is known.
    scale = shift.clamp(max=LARGEST).exp()
    shift_tau = (shift / temperature).clamp(max=LARGEST)
    scale_tau = shift_tau.exp()
    return PartSums(
        sums.index,
        top,
        scale * sums.total,
        scale_tau * sums.total_tau,
        scale_tau * (sums.weighted + shift_tau * sums.total_tau),
        None if sums.mixed_MD is None else sums.mixed_MD * scale[:, None],
    )


def _better(z_MD: Tensor, rows_KD: Tensor, first_M: Tensor, second_M: Tensor) -> tuple[Tensor, Tensor]:
    """The better of two codes by fp64 scores, the lower index where they are equal, and its score."""
    first, second = ((z_MD.double() * rows_KD[index].double()).sum(dim=1) for index in (first_M, second_M))
    takes = (second > first) | ((second == first) & (second_M < first_M))
    return torch.where(takes, second_M, first_M), torch.where(takes, second, first).to(z_MD.dtype)


def _fields(found_TM: Tensor, codes: int, segments: Segments, field_tokens: int, field_codes: int) -> Tensor:
    """Where any token is found, as bytes (U, T): fields of each segment's tokens × fields of codes.

    `found_TM` is of tiles of `codes`; one of the two numbers of codes divides the other.
    """
    parts = []
    for segment in segments:
        found = F.pad(found_TM[:, segment].byte(), (0, -(segment.stop - segment.start) % field_tokens))
        parts.append(found.view(len(found), -1, field_tokens).amax(dim=2))
    found_TU = torch.cat(parts, dim=1)
    if field_codes < codes:
        found_TU = found_TU.repeat_interleave(codes // field_codes, dim=0)
    elif field_codes > codes:
        found_TU = F.pad(found_TU, (0, 0, 0, -len(found_TU) % (field_codes // codes)))
        found_TU = found_TU.view(-1, field_codes // codes, found_TU.shape[1]).amax(dim=1)
    return found_TU.T.contiguous()


def _pooled(fields_UT: Tensor, tile: Tile) -> Tensor:
    """The map for a kernel's tile, of which fields are parts."""
    rows, columns = tile.tokens // field(), tile.codes // field()
    U, T = fields_UT.shape
    padded = F.pad(fields_UT, (0, -T % columns, 0, -U % rows))
    return padded.view(_blocks(U, rows), rows, _blocks(T, columns), columns).amax(dim=(1, 3))


def _by_segment(segments: Segments, active_UT: Tensor) -> list[tuple[slice, Tensor]]:
    sizes = [_blocks(segment.stop - segment.start, field()) for segment in segments]
    return list(zip(segments, torch.split(active_UT, sizes), strict=True))


def _floats(like: Tensor, number: int, *shape: int) -> tuple[Tensor, ...]:
    return torch.empty((number, *shape), dtype=torch.float32, device=like.device).unbind()


def _blocks(length: int, size: int) -> int:
    return -(-length // size)
