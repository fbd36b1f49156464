"""The tiles of each kernel, those that fit a chip, and the one of a launch.

`ibq-scale bench kernels` compiles them all without a GPU and prints their resources.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ibq_scale.quantize import column_kernels, kernels
from ibq_scale.quantize.product import Precision

if TYPE_CHECKING:
    from ibq_scale.quantize.compiled import Needs

log = logging.getLogger(__name__)


class Tile(NamedTuple):
    """Tokens × codes of a program's step, dimensions read at once, warps of a program, stages of its loads."""

    tokens: int
    codes: int
    dims: int
    warps: int
    stages: int


class Chip(NamedTuple):
    """A GPU as the compiler takes it. `shared`: bytes of shared memory for one program, at most."""

    name: str
    arch: str
    shared: int


KERNELS: dict[str, Any] = {
    name: getattr(kernels, f"_{name}_kernel") for name in ("sums", "soft_codes", "means", "row_sums", "slopes", "best")
}
# Kernels without matrix products, of lists of candidates and of the cuBLAS backend. They need little: one tile serves.
LIST_KERNELS: dict[str, Any] = {
    name: getattr(kernels, f"_{name}_kernel") for name in ("candidates", "rescore", "candidate_slopes")
}
COLUMN_KERNELS: dict[str, Any] = {
    name: getattr(column_kernels, f"_{name}_kernel")
    for name in ("column_sums", "column_means", "column_dots", "column_slopes")
}
# By preference, from the resources by `bench kernels`: larger tiles first, for more use of each load.
_TILES = (Tile(128, 64, 64, 8, 3), Tile(64, 128, 64, 8, 3), Tile(64, 64, 64, 8, 3), Tile(64, 64, 32, 4, 3))
TILES: dict[str, tuple[Tile, ...]] = dict.fromkeys(KERNELS, _TILES) | {
    # All dimensions at once: programs with fewer would each read the weights again.
    "soft_codes": (Tile(128, 64, 256, 8, 3), Tile(128, 64, 128, 8, 3), Tile(64, 64, 128, 8, 3), *_TILES)
}
# 32 tokens side by side are 128 bytes, one access of a warp.
COLUMN_TILE = Tile(32, 64, 1, 4, 2)
_settled: dict[str, Tile] = {}
INTERPRETED = Tile(16, 16, 16, 4, 1)
# Waves of programs of a launch. A part of the codes is a multiple of the unit: any tile divides it.
WAVES, SPLIT_UNIT = 2, 128
INTERPRETED_PROGRAMS, INTERPRETED_UNIT = 6, 16
# Places of a token's lists of candidates and of rivals. Trained tokens have tens of candidates.
CANDIDATES, RIVALS = 512, 64
# Codes searched at once for a list, and entries of a list read at once.
SOUGHT, CODES = 1024, 16


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device and slowly. Decided when they are imported."""
    return not hasattr(kernels._best_kernel, "create_binder")


def constants(kernel: str, tile: Tile, dim: int, precision: Precision) -> dict[str, Any]:
    """The compile-time arguments of a kernel. One of lists reads all dimensions of a code at once."""
    values = {
        "D": dim,
        "BD": 1 << (dim - 1).bit_length() if kernel in LIST_KERNELS else tile.dims,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "BM": tile.tokens,
        "BK": tile.codes,
        "TOP": tile.codes,
        "L": CANDIDATES,
        "R": RIVALS,
        "BL": CODES,
        "BC": SOUGHT,
    }
    return {name: value for name, value in values.items() if name in function(kernel).arg_names}


def function(kernel: str) -> Any:
    """Triton's function of a kernel."""
    return (KERNELS | LIST_KERNELS | COLUMN_KERNELS)[kernel]


def offered(kernel: str, dim: int) -> tuple[Tile, ...]:
    """The kernel's tiles for D: no wider than it needs. A product wants at least 16 dimensions."""
    if kernel in LIST_KERNELS:
        return (Tile(1, 64, CODES, 4, 2),)
    if kernel in COLUMN_KERNELS:
        return (COLUMN_TILE,)
    width = max(16, 1 << (dim - 1).bit_length())
    return tuple(dict.fromkeys(tile._replace(dims=min(tile.dims, width)) for tile in TILES[kernel]))


@cache
def chip(device: torch.device) -> Chip:
    """The GPU of this device, with the shared memory by which Triton's launcher refuses a kernel."""
    from triton.runtime import driver

    with torch.cuda.device(device):
        arch = driver.active.get_current_target().arch
        shared = driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
    return Chip(torch.cuda.get_device_name(device), arch if isinstance(arch, str) else f"sm_{arch}", shared)


def fitting(kernel: str, precision: Precision, dim: int, on: Chip) -> Iterator[tuple[Tile, bool]]:
    """The kernel's tiles within the chip's shared memory, by preference, each with True if it spills no registers."""
    for tile in offered(kernel, dim):
        needs = _needs(kernel, precision, dim, tile, on.arch)
        if needs is not None and needs.shared <= on.shared:
            yield tile, needs.stack == 0


@cache
def _needs(kernel: str, precision: Precision, dim: int, tile: Tile, arch: str) -> Needs | None:
    """The resources of a compiled tile, None if it does not compile. Takes seconds once: Triton caches binaries."""
    from ibq_scale.quantize.compiled import build, needs

    try:
        return needs(build(kernel, arch, precision, dim, tile))
    # The compiler raises its passes' errors, RuntimeError and bare assertions among them.
    except Exception as e:
        log.info("%s %s %s, D = %d: %s", kernel, tuple(tile), precision, dim, e)
        return None


def without_tile(names: Sequence[str], precision: Precision, dim: int, device: torch.device) -> str | None:
    """Why some of these kernels cannot run on this GPU, or None."""
    on = chip(device)
    for kernel in names:
        if next(fitting(kernel, precision, dim, on), None) is None:
            return (
                f"has no tile of its kernel '{kernel}' ({precision}, {dim} dimensions) for the {on.shared >> 10} KiB "
                f"of shared memory of {on.name}"
            )
    return None


def chosen(kernel: str, precision: Precision, dim: int, device: torch.device, most_codes: int = 1 << 30) -> Tile:
    """The tile of a launch, of at most `most_codes`: the run's, else the first to fit without spills, else to fit.

    No timing decides: every rank and every restart adds in the same order.
    """
    if interpreted():
        return INTERPRETED
    on = chip(device)
    return _settled.get(_key(kernel, precision, dim, on)) or _first(kernel, precision, dim, on, most_codes)


def settle(record: Mapping[str, Any], precision: Precision, dim: int, device: torch.device) -> dict[str, list[int]]:
    """Makes later launches take a run's tiles. Returns the record with this GPU's missing tiles added.

    Entries of another form are left out. The record keeps a restart's tiles under another release of Triton, with other
    compiled sizes.
    """
    on = chip(device)
    _settled.update({key: Tile(*sizes) for key, sizes in record.items() if _is_tile(sizes)})
    for kernel in (*KERNELS, *LIST_KERNELS):
        if (key := _key(kernel, precision, dim, on)) not in _settled:
            most = _settled[_key("sums", precision, dim, on)].codes if kernel == "soft_codes" else 1 << 30
            _settled[key] = _first(kernel, precision, dim, on, most)
    return {key: list(tile) for key, tile in sorted(_settled.items())}


def _is_tile(sizes: Any) -> bool:
    fits = isinstance(sizes, list) and len(sizes) == len(Tile._fields)
    return fits and all(type(size) is int and 0 < size <= 1 << 12 for size in sizes)


def _key(kernel: str, precision: Precision, dim: int, on: Chip) -> str:
    return f"{kernel} {on.arch} {precision} {dim}"


@cache
def _first(kernel: str, precision: Precision, dim: int, on: Chip, most_codes: int) -> Tile:
    spilling = []
    for tile, whole in fitting(kernel, precision, dim, on):
        if tile.codes <= most_codes:
            if whole:
                return tile
            spilling.append(tile)
    return spilling[0]


class Split(NamedTuple):
    """`parts` parts of `size` (the last may be smaller) of a loop, enough for a launch to fill the device."""

    parts: int
    size: int

    @staticmethod
    def of(length: int, programs: int, device: torch.device) -> Split:
        """Of a loop of `length`, for a launch with so many programs a part."""
        wanted, unit = INTERPRETED_PROGRAMS, INTERPRETED_UNIT
        if not interpreted():
            wanted, unit = WAVES * torch.cuda.get_device_properties(device).multi_processor_count, SPLIT_UNIT
        wished = max(1, min(wanted // programs, ceil_div(length, 4 * unit)))
        size = ceil_div(ceil_div(length, wished), unit) * unit
        return Split(ceil_div(length, size), size)


def ceil_div(length: int, size: int) -> int:
    """Blocks of `size` over a length."""
    return -(-length // size)


def launch(kernel: str, tile: Tile, grid: tuple[int, ...], dim: int, precision: Precision, *arguments: Any) -> None:
    fixed = constants(kernel, tile, dim, precision)
    function(kernel)[grid](*arguments, **fixed, num_warps=tile.warps, num_stages=tile.stages)
