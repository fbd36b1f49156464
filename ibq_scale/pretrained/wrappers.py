"""Removes wrappers around the weights of foreign checkpoints: containers, name prefixes, harmless other values."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ibq_scale.errors import UserError

# Keys of the weights, in this order: Lightning's, torch's examples', DeepSpeed's, timm's, diffusers'.
CONTAINERS = ("state_dict", "model", "model_state_dict", "module", "weights", "net", "params", "generator")
# Parts of names from wrappers: DDP's and DeepSpeed's, torch.compile's, FSDP's, activation checkpointing's.
COMPONENTS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module"}
OWNERS_WAY = (
    "if you trust it, load it once in Python with torch.load(FILE, weights_only=False) and torch.save its state_dict"
)


def harmless() -> list[Any]:
    """Types of other values without side effects on unpickling: numpy's numbers and arrays, paths."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    kinds = {type(np.dtype(code)) for code in (*np.typecodes["AllInteger"], *np.typecodes["Float"], "?", "D", "F")}
    paths = (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
    return [np.dtype, *kinds, multiarray.scalar, multiarray._reconstruct, np.ndarray, *paths]


def unwrap(content: object, known: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Weights by their own names, the values beside them, and the removed wrappers.

    `known`: names, at least one of them in each model. The text before it is a prefix of all names.
    """
    state = content if isinstance(content, Mapping) else {}
    beside: dict[str, Any] = {}
    taken_off: list[str] = []
    while (key := _container(state)) is not None:
        beside |= {str(k): v for k, v in state.items() if k != key}
        state = state[key]
        if key != "state_dict":
            taken_off.append(f"'{key}'")
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        found = [f"{part}." for part in parts if part in COMPONENTS]
        taken_off += [part for part in dict.fromkeys(found) if part not in taken_off]
        named[".".join(part for part in parts if part not in COMPONENTS)] = tensor
    if len(named) != len(tensors):
        raise UserError(
            f"it has tensors with and without {', '.join(taken_off)} before their names: save one set of them"
        )
    prefix = _prefix(named, known)
    if prefix:
        taken_off.append(prefix)
        named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return named, beside, taken_off


def _container(state: Mapping[Any, Any]) -> str | None:
    if any(isinstance(value, Tensor) for value in state.values()):
        return None
    return next((key for key in CONTAINERS if isinstance(state.get(key), Mapping) and state[key]), None)


def _prefix(names: Collection[str], known: Collection[str]) -> str:
    """The prefix before a known name, empty if a known name has none."""
    found = [name[: -len(end)] for end in known for name in names if name.endswith(f".{end}")]
    return "" if not found or any(end in names for end in known) else min(found, key=len)


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors with nan or inf."""
    numbers = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and not tensor.is_meta}
    return [name for name, tensor in numbers.items() if not torch.isfinite(tensor).all()]


def refused(file: Path, code: str) -> UserError:
    return UserError(
        f"{file} holds more than tensors ({code}), and running code from a checkpoint is refused: "
        f"ask its author for the state_dict alone, or, {OWNERS_WAY}"
    )
