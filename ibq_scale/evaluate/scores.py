"""Metrics of generated images from their Inception features, and rows of all ranks in one order."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ibq_scale.distributed.world import World
from ibq_scale.quantize.collectives import gather_uneven, sizes_in

SPLITS = 10
NEIGHBOURS = 3
# torch-fidelity's. Images sorted by class are shuffled first, since a split would hold few classes.
SHUFFLE_SEED = 2020
# Blocks of distances. A block's numbers depend on its size but not on its rank.
ROWS, COLUMNS = 1024, 8192


def gather_rows(indices_n: Tensor, rows_nC: Tensor) -> Tensor:
    """All ranks' rows (N, C), by ascending index, on every rank. Collective. Ranks may have different numbers of rows.

    `indices_n`: int64. Each index must be on one rank only.
    """
    group = dist.group.WORLD
    sizes = sizes_in(len(indices_n), group, rows_nC.device)
    index_N = gather_uneven(indices_n.to(rows_nC.device), sizes, group)
    return gather_uneven(rows_nC, sizes, group)[torch.argsort(index_N)]


def inception_score(logits_NC: Tensor, split: int = 0) -> tuple[float, float]:
    """Mean and standard deviation (ddof 0) of the score over parts of the set.

    `split` 0: ten parts of shuffled logits, as in torch-fidelity. Else parts of `split` images in order, as in ADM's
    evaluator (5,000). ValueError for fewer than ten images with `split` 0.
    """
    count = len(logits_NC)
    if split:
        parts = list(torch.split(torch.arange(count), split))
    elif count < SPLITS:
        raise ValueError(f"an inception score needs {SPLITS} images, got {count}")
    else:
        order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
        parts = [torch.from_numpy(order[i * count // SPLITS : (i + 1) * count // SPLITS]) for i in range(SPLITS)]
    scores = []
    for chosen in parts:
        log_p = logits_NC[chosen.to(logits_NC.device)].double().log_softmax(dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(dim=0, keepdim=True).log())).sum(dim=1)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_and_recall(real_RF: Tensor, fake_GF: Tensor, world: World) -> tuple[float, float]:
    """Share of generated features within the real ones' manifold, and the other way round (Kynkäänniemi et al. 2019).

    The manifold is the union of balls up to the third nearest neighbour. All ranks have all features and share the
    blocks of distances. At most 1024 × 8192 distances are in memory at once. Collective. ValueError for fewer than
    four features on a side.
    """
    if min(len(real_RF), len(fake_GF)) <= NEIGHBOURS:
        raise ValueError(f"precision and recall need more than {NEIGHBOURS} images on both sides")
    precision = _covered(fake_GF, real_RF, _radii(real_RF, world), world)
    recall = _covered(real_RF, fake_GF, _radii(fake_GF, world), world)
    return precision, recall


def _blocks(count: int, world: World) -> list[slice]:
    """This rank's rows."""
    return [slice(first, first + ROWS) for first in range(0, count, ROWS)][world.rank :: world.size]


def _radii(features_NF: Tensor, world: World) -> Tensor:
    """Distance (N,) of each feature to its third nearest neighbour."""
    radii_N = features_NF.new_zeros(len(features_NF))
    for rows in _blocks(len(features_NF), world):
        own = features_NF[rows]
        nearest = own.new_full((len(own), NEIGHBOURS + 1), torch.inf)
        for columns in torch.split(features_NF, COLUMNS):
            both = torch.cat([nearest, torch.cdist(own, columns)], dim=1)
            # One more, since each feature is its own nearest.
            nearest = both.topk(NEIGHBOURS + 1, dim=1, largest=False, sorted=True).values
        radii_N[rows] = nearest[:, -1]
    dist.all_reduce(radii_N)
    return radii_N


def _covered(queries_QF: Tensor, centres_NF: Tensor, radii_N: Tensor, world: World) -> float:
    """The share of queries inside at least one ball."""
    inside = torch.zeros((), dtype=torch.int64, device=queries_QF.device)
    for rows in _blocks(len(queries_QF), world):
        own = queries_QF[rows]
        found = torch.zeros(len(own), dtype=torch.bool, device=own.device)
        for columns, radii in zip(torch.split(centres_NF, COLUMNS), torch.split(radii_N, COLUMNS), strict=True):
            found |= (torch.cdist(own, columns) <= radii).any(dim=1)
        inside += found.sum()
    dist.all_reduce(inside)
    return int(inside) / len(queries_QF)
