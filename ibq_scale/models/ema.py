"""Exponential moving average of weights, in fp32 for weights of any dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class EMA:
    """shadow ← decay · shadow + (1 − decay) · weight, for the given tensors."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._shadow = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """One step towards `weights` (the same names)."""
        if self._shadow:
            values = [weights[name].detach().float() for name in self._shadow]
            # One kernel for many tensors: hundreds of small kernels would be bound by their launches.
            torch._foreach_lerp_(list(self._shadow.values()), values, 1.0 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The shadow itself (fp32), not a copy."""
        return self._shadow

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies a saved shadow of the same names."""
        assert state.keys() == self._shadow.keys(), "the saved average is of other weights"
        for name, shadow in self._shadow.items():
            shadow.copy_(state[name])
