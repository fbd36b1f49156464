"""The resources of the quantizer's and the norm's kernels on a chip, from code compiled for it here, without a GPU.

Triton compiles for any target: its wheel has the assembler and the disassembler. The compiler reports shared memory.
The binary has registers and stack, and its instructions show the tensor cores and the asynchronous loads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ibq_scale.errors import UserError
from ibq_scale.quantize.product import Precision

if TYPE_CHECKING:
    from ibq_scale.quantize.tiles import Tile

KIB = 1024
# Most shared memory of one program: CUDA programming guide, "technical specifications per compute capability", and
# local data share of CDNA 3.
SHARED_LIMITS = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
}
ARCHS = tuple(SHARED_LIMITS)
PRECISIONS: tuple[Precision, ...] = ("bf16", "tf32", "fp32")
KERNEL_NAMES = ("sums", "soft_codes", "means", "row_sums", "slopes", "best")
# Those without matrix products, of the lists of candidates and of the cuBLAS backend.
OTHER_KERNEL_NAMES = (
    "candidates", "rescore", "candidate_slopes", "column_sums", "column_means", "column_dots", "column_slopes"
)  # fmt: skip
# Of the fused GroupNorm and SiLU, for D channels.
NORM_KERNEL_NAMES = (
    "norm_parts", "norm_statistics", "norm_apply", "norm_grad_parts", "norm_grad_sums", "norm_grad_apply"
)  # fmt: skip
# Matrix instructions of Hopper, of Blackwell, of all other NVIDIA chips, and of AMD's.
TENSOR_CORES = (("HGMMA", "wgmma"), ("UTC[A-Z]*MMA", "mma"), ("HMMA", "mma"), ("v_mfma", "mma"))
ASYNC = "LDGSTS|UTMALDG|buffer_load_.* lds|global_load_lds"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/|^\s+(?:v|s|ds|buffer|global)_\w+ ", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """One kernel compiled for one chip. `tile`: tokens, codes, dimensions at once, warps, stages.

    Norm's kernels have pixels and channels for tokens and codes.

    `tensor_core`: wgmma (Hopper), mma (others, named by `instruction`) or none. `spill_bytes`: a thread's stack, of
    spills alone. `async_copies` counts loads to shared memory past the registers. Where
    `error` says why a kernel did not compile, numbers are 0.
    """

    kernel: str
    arch: str
    precision: str
    dim: int
    tile: tuple[int, ...]
    shared_bytes: int
    shared_limit: int
    registers: int
    spill_bytes: int
    tensor_core: str
    instruction: str
    async_copies: int
    instructions: int
    fits: bool
    error: str = ""

    @property
    def case(self) -> tuple[str, str, str, int]:
        """The case for one fitting tile."""
        return self.kernel, self.arch, self.precision, self.dim


def kernel_rows(
    kernels: Sequence[str], archs: Sequence[str], precisions: Sequence[Precision], dims: Sequence[int]
) -> Iterator[Row]:
    """A row for each kernel, chip, precision, dimension and tile. UserError where Triton cannot compile here."""
    try:
        from ibq_scale.quantize import tiles
    except ImportError:
        raise UserError("bench kernels needs the triton package: pip install triton") from None
    if tiles.interpreted():
        raise UserError("bench kernels compiles, and TRITON_INTERPRET is set: unset it")
    for arch in archs:
        for precision in precisions:
            for dim in dims:
                for kernel in kernels:
                    for tile in _offered(kernel, dim):
                        yield row(kernel, arch, precision, dim, tile)


def _offered(kernel: str, dim: int) -> tuple[Tile, ...]:
    from ibq_scale.models import fused_norm
    from ibq_scale.quantize.tiles import Tile, offered

    if kernel in NORM_KERNEL_NAMES:
        return (Tile(*fused_norm.tile(dim), 1, fused_norm.WARPS, fused_norm.STAGES),)
    return offered(kernel, dim)


def _built(kernel: str, arch: str, precision: Precision, dim: int, tile: Tile) -> Any:
    from ibq_scale.models import fused_norm
    from ibq_scale.quantize.compiled import build

    if kernel in NORM_KERNEL_NAMES:
        return fused_norm.build(kernel, arch, "bf16" if precision == "bf16" else "fp32", dim)
    return build(kernel, arch, precision, dim, tile)


def row(kernel: str, arch: str, precision: Precision, dim: int, tile: Tile) -> Row:
    from ibq_scale.quantize.compiled import machine_code, needs

    limit = SHARED_LIMITS[arch]
    head = (kernel, arch, precision, dim, tuple(tile))
    try:
        built = _built(kernel, arch, precision, dim, tile)
    # The compiler raises its passes' errors, RuntimeError and bare assertions among them.
    except Exception as e:
        why = f"{type(e).__name__}: {e}".partition("\n")[0]
        return Row(*head, 0, limit, 0, 0, "none", "", 0, 0, fits=False, error=why)
    found, code = needs(built), machine_code(built)
    instruction, core = next(
        ((match[0], core) for pattern, core in TENSOR_CORES if (match := re.search(pattern, code))), ("", "none")
    )
    return Row(
        *head,
        shared_bytes=found.shared,
        shared_limit=limit,
        registers=found.registers,
        spill_bytes=found.stack,
        tensor_core=core,
        instruction=instruction,
        async_copies=len(re.findall(ASYNC, code)),
        instructions=len(INSTRUCTION.findall(code)),
        fits=found.shared <= limit,
    )
