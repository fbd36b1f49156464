"""Orders of codes in training: raster, or a permutation per sample with a target-aware embedding (arXiv 2411.00776).

In order π the input of step t is code π(t − 1), and its target is code π(t). A model in raster order needs no sign of
the target. `OrderEmbedding` adds e[π(t)] − e[π(t − 1) + 1], the difference between the target and the raster successor
of the input. In raster order both are equal, so the difference is exactly zero: the model is then the plain one for
any e, and an export leaves e out.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Names of parameters that only training has, and no model on disk.
TRAINING_ONLY = ("order_emb.weight",)


def draw_orders(seed: int, positions: list[int], shares: list[float], tokens: int) -> Tensor:
    """Orders int64 (B, tokens): row b is a random permutation with probability `shares[b]`, else the raster order.

    A pure function of seed and the sample's absolute position, so ranks and restarts do not change it. The permutation
    sorts raw Philox bits, since a library's own one may change between versions.
    """
    orders = np.tile(np.arange(tokens), (len(positions), 1))
    for row, (position, share) in enumerate(zip(positions, shares, strict=True)):
        if share > 0:
            # The second word of the key separates these numbers from the order of samples (data/order.py).
            key = (seed & 0xFFFFFFFFFFFFFFFF) | (0x0DE << 116)
            bits = np.random.Philox(key=key, counter=position << 64).random_raw(tokens + 1)
            if int(bits[0]) < share * 2.0**64:
                orders[row] = np.argsort(bits[1:], kind="stable")
    return torch.from_numpy(orders)


def inputs_of(orders_BT: Tensor) -> Tensor:
    """The raster successor of each step's input, int64 (B, T): 0 for the prefix, then π(t − 1) + 1."""
    return F.pad(orders_BT[:, :-1] + 1, (1, 0))


def permuted_tables(table_2Sp: Tensor, orders_BT: Tensor) -> Tensor:
    """Rotations (2, 2, B, T, p) of queries and keys. `table_2Sp`: all rows of `rotary_table`.

    A key turns by the place of its code. A query turns by the raster predecessor of its target, so a target sees all
    keys at the same angles as in raster order. The predecessor of code 0 is the prefix at step 0, else the place left
    of code 0.
    """
    first = torch.arange(orders_BT.shape[1], device=orders_BT.device) == 0
    queries_BT = torch.where((orders_BT == 0) & ~first, table_2Sp.shape[1] - 1, orders_BT)
    return torch.stack([table_2Sp[:, queries_BT], table_2Sp[:, inputs_of(orders_BT)]])


class OrderEmbedding(nn.Embedding):
    """tokens + 1 rows: one for each target, and one for the successor of the last code."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(tokens + 1, width)

    def forward(self, orders_BT: Tensor) -> Tensor:
        """What the steps' inputs need (B, T, E), zero for raster order.

        Two look-ups, so that the two parts of the gradient cancel exactly in raster order.
        """
        return F.embedding(orders_BT, self.weight) - F.embedding(inputs_of(orders_BT), self.weight)
