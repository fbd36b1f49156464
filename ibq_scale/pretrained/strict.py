"""Loads weights into a module, all or none. A missing tensor is an error and never stays randomly initialised."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ibq_scale.errors import UserError


def fill_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Copies `tensors` into the module. A module on the meta device takes them as its own, in `dtype`.

    UserError with every missing, misshapen or unexpected tensor.
    """
    wanted = module.state_dict()
    require_fit(wanted, tensors, str(folder))
    own = any(tensor.is_meta for tensor in wanted.values())
    module.load_state_dict({name: tensor.to(dtype) if own else tensor for name, tensor in tensors.items()}, assign=own)


def require_layers(names: Collection[str], layers: Mapping[str, int], where: str) -> None:
    """UserError if the names have another number of layers for a pattern, before any layer is built."""
    for pattern, wanted in layers.items():
        if (found := count_layers(names, pattern, where)) != wanted:
            label = pattern.replace(r"(\d+)", "N").replace("\\", "")
            raise UserError(f"{where}: weights do not fit the model: {found} of {label}* instead of {wanted}")


def count_layers(names: Collection[str], pattern: str, where: str) -> int:
    """Number of layers in names: different values of the group in `pattern`. UserError if they are not 0, 1, 2 …"""
    # No file has enough names for a longer number.
    numbers = {int(m[1]) if len(m[1]) < 8 else 10**8 for name in names if (m := re.match(pattern, name))}
    if (last := max(numbers, default=-1)) != len(numbers) - 1:
        raise UserError(
            f"{where}: weights fit no model: {len(numbers)} layers there are numbered up to {min(last, 10**8)}"
        )
    return len(numbers)


def require_fit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """UserError if the names or shapes in `found` differ from `wanted`, with all differences in one line.

    A completely missing (misshapen, …) module is named once: ``decoder.* (248) missing``.
    """
    missing = wanted.keys() - found.keys()
    misshapen = {k for k in wanted.keys() & found.keys() if found[k].shape != wanted[k].shape}
    whole = [k for k in wanted if k in found and k not in misshapen and not found[k].is_floating_point()]
    faults = [f"{label} missing" for label, _ in _together(missing, wanted)]
    for label, k in _together(misshapen, wanted):
        example = "" if label == k else f"of {k} "
        faults.append(f"{label} misshapen ({example}{tuple(found[k].shape)} instead of {tuple(wanted[k].shape)})")
    faults += [f"{label} of whole numbers" for label, _ in _together(whole, wanted)]
    faults += [f"{label} not expected" for label, _ in _together(found.keys() - wanted.keys(), found)]
    if faults:
        raise UserError(f"{where}: weights do not fit the model: {'; '.join(faults)}")


def _together(names: Collection[str], universe: Collection[str]) -> list[tuple[str, str]]:
    """Labels of `names` in the universe's order, each with its first name."""
    total, named = Counter[str](), Counter[str]()
    for name in universe:
        total.update(_prefixes(name))
        named.update(_prefixes(name) if name in names else [])
    labels: dict[str, str] = {}
    for name in universe:
        if name in names:
            # From the shortest prefix to the longest, so the widest complete module is used.
            whole = next((p for p in _prefixes(name) if named[p] == total[p] > 1), None)
            labels.setdefault(f"{whole}.* ({total[whole]})" if whole else name, name)
    return list(labels.items())


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
