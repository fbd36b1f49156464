"""Orders of codes in training: raster, or a permutation per sample with a target-aware embedding (arXiv 2411.00776).

In order π the input of step t is code π(t − 1), and its target is code π(t). The input receives s · e[π(t)], the row of
its target. RAR folds these rows into the position embedding at the end. A model with rotary positions has none, so the
scale s falls to 0 with the probability r of a random order: s = r for a sample in raster order, and 1 for a permuted
one. At r = 0 every sample is in raster order, with nothing added: the model is then the plain one, and an export
leaves e out. At r > 0 an export has r · e.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The parameter that only models of random orders have.
ORDER_EMBEDDING = "order_emb.weight"


class Orders(NamedTuple):
    """`places_BT` int64: the raster place of each step's target. `scales_B` fp32: the scale of its row of e."""

    places_BT: Tensor
    scales_B: Tensor


def draw_orders(seed: int, positions: list[int], shares: list[float], tokens: int) -> Orders:
    """Row b is a random permutation with probability r = `shares[b]`, else the raster order.

    A pure function of seed and the sample's absolute position, so ranks and restarts do not change it. The permutation
    sorts raw Philox bits, since a library's own one may change between versions.
    """
    places = np.tile(np.arange(tokens), (len(positions), 1))
    scales = np.array(shares, dtype=np.float32)
    for row, (position, share) in enumerate(zip(positions, shares, strict=True)):
        if share > 0:
            # The second word of the key separates these numbers from the order of samples (data/order.py).
            key = (seed & 0xFFFFFFFFFFFFFFFF) | (0x0DE << 116)
            bits = np.random.Philox(key=key, counter=position << 64).random_raw(tokens + 1)
            if int(bits[0]) < share * 2.0**64:
                places[row], scales[row] = np.argsort(bits[1:], kind="stable"), 1.0
    return Orders(torch.from_numpy(places), torch.from_numpy(scales))


def permuted_tables(table_2Sp: Tensor, places_BT: Tensor) -> Tensor:
    """Rotations (2, 2, B, T, p) of queries and keys. `table_2Sp`: all rows of `rotary_table`.

    A key turns by the place of its code. A query turns by the raster predecessor of its target, so a target sees all
    keys at the same angles as in raster order. The predecessor of code 0 is the prefix at step 0, else the place left
    of code 0.
    """
    first = torch.arange(places_BT.shape[1], device=places_BT.device) == 0
    queries_BT = torch.where((places_BT == 0) & ~first, table_2Sp.shape[1] - 1, places_BT)
    # Rows of the prefix and then of the codes π(t − 1).
    keys_BT = F.pad(places_BT[:, :-1] + 1, (1, 0))
    return torch.stack([table_2Sp[:, queries_BT], table_2Sp[:, keys_BT]])
