"""Kernels compiled for any chip, present or not, and their use of its resources."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ibq_scale.quantize.product import Precision
from ibq_scale.quantize.tiles import Tile, constants, function

_TYPES = {
    "i32": ("M", "B", "K", "stride", "codes_a_split", "rows_a_split", "codes_a_top", "first_code"),
    "*i32": ("index", "count", "candidates", "candidate_count", "rivals", "rival_count"),
    "fp32": ("inv_tau", "margin", "slack"),
}


class Needs(NamedTuple):
    """Bytes of shared memory of a program, registers and bytes of stack of a thread: the stack is of spills alone."""

    shared: int
    registers: int
    stack: int


def target(arch: str) -> GPUTarget:
    """``sm_90`` or ``gfx942`` as Triton names it."""
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def build(kernel: str, arch: str, precision: Precision, dim: int, tile: Tile) -> Any:
    """Triton's compiled kernel of the quantizer. Errors of the compiler's passes come through."""
    fixed = constants(kernel, tile, dim, precision)
    types = {name: _type(kernel, name, precision) for name in function(kernel).arg_names if name not in fixed}
    return build_function(function(kernel), arch, types, fixed, tile.warps, tile.stages)


def build_function(
    source_of: Any,
    arch: str,
    types: Mapping[str, str],
    fixed: Mapping[str, Any],
    warps: int,
    stages: int,
    odd: Collection[str] = (),
) -> Any:
    """Compiles Triton's function for arguments of these types (``*bf16``, ``i32``, …) and compile-time values.

    16 divides all addresses and integers but `odd` ones.
    """
    # The launcher tells the compiler about 16, as in training. It cannot for floats.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(source_of.arg_names)
        if name in types and types[name] != "fp32" and name not in odd
    }
    signature = {name: types.get(name, "constexpr") for name in source_of.arg_names}
    source = ASTSource(fn=source_of, signature=signature, constexprs=dict(fixed), attrs=aligned)
    return triton.compile(source, target=target(arch), options={"num_warps": warps, "num_stages": stages})


def needs(built: Any) -> Needs:
    """Read from the binary, by the disassembler of Triton's own wheel."""
    if "amdgcn" in built.asm:
        code = str(built.asm["amdgcn"])
        used = [re.search(rf"\.{name}:\s+(\d+)", code) for name in ("vgpr_count", "private_segment_fixed_size")]
        registers, stack = (int(found[1]) if found else 0 for found in used)
        return Needs(built.metadata.shared, registers, stack)
    text = _dump(built, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    return Needs(built.metadata.shared, int(found[1]), int(found[2]) + int(found[3]))


def machine_code(built: Any) -> str:
    return str(built.asm["amdgcn"]) if "amdgcn" in built.asm else _dump(built, "-sass")


def _type(kernel: str, name: str, precision: Precision) -> str:
    # Lists are scored anew from fp32.
    if name in ("weights", "slopes") or (name in ("z", "c", "g") and kernel not in ("rescore", "candidate_slopes")):
        return "*bf16" if precision == "bf16" else "*fp32"
    return next((kind for kind, names in _TYPES.items() if name in names), "*fp32")


def _dump(built: Any, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        return subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, encoding="utf-8", check=True
        ).stdout
