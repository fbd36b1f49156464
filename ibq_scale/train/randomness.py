"""A step's random numbers are a function of the seed and the samples' positions. There is no state to save."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seed_by_position(seed: int, requests_B5: Tensor) -> None:
    """Seeds torch's generators, on every device, for a micro-batch (`data.stream` defines its requests).

    Dropout is then the same on any number of ranks, with any accumulation, and after any restart.
    """
    digest = hashlib.blake2b(f"{seed} {int(requests_B5[0, 0])}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
