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
# Rows of a block of distances. A block's numbers depend on its size but not on its rank.
ROWS = 256


def gather_rows(indices_n: Tensor, rows_nC: Tensor) -> Tensor:
    """All ranks' rows (N, C), by ascending index, on every rank. Collective. Ranks may have different numbers of rows.

    `indices_n`: int64. Each index must be on one rank only.
    """
    group = dist.group.WORLD
    sizes = sizes_in(len(indices_n), group, rows_nC.device)
    index_N = gather_uneven(indices_n.to(rows_nC.device), sizes, group)
    return gather_uneven(rows_nC, sizes, group)[torch.argsort(index_N)]


def inception_score(logits_NC: Tensor, split: int = 0) -> tuple[float, float]:
    """Mean and standard deviation (ddof 0) of the score over parts of the set, by torch-fidelity's formula.

    `split` 0: ten parts of shuffled logits, as in torch-fidelity, since a part of images sorted by class would hold few
    classes. Else parts of `split` images in order, as in ADM's evaluator (5,000).
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if not split:
        found = isc_features_to_metric(logits_NC, SPLITS)
        return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]
    parts = [isc_features_to_metric(part, 1, shuffle=False) for part in torch.split(logits_NC, split)]
    scores = [part[KEY_METRIC_ISC_MEAN] for part in parts]
    return float(np.mean(scores)), float(np.std(scores))


def precision_and_recall(real_RF: Tensor, fake_GF: Tensor, world: World) -> tuple[float, float]:
    """Share of generated features within the real ones' manifold, and the other way round (Kynkäänniemi et al. 2019).

    The manifold is the union of balls up to the third nearest neighbour. All ranks have all features, more than
    `NEIGHBOURS` on both sides, and share the blocks of distances. Collective.
    """
    return _covered(fake_GF, real_RF, world), _covered(real_RF, fake_GF, world)


def _covered(queries_QF: Tensor, centres_NF: Tensor, world: World) -> float:
    """The share of queries inside at least one ball around a centre."""
    radii_N = centres_NF.new_zeros(len(centres_NF))
    for rows in _blocks(len(centres_NF), world):
        distances = torch.cdist(centres_NF[rows], centres_NF)
        # One more, since each centre is its own nearest.
        radii_N[rows] = distances.topk(NEIGHBOURS + 1, largest=False).values[:, -1]
    dist.all_reduce(radii_N)
    inside = torch.zeros((), dtype=torch.int64, device=queries_QF.device)
    for rows in _blocks(len(queries_QF), world):
        inside += (torch.cdist(queries_QF[rows], centres_NF) <= radii_N).any(dim=1).sum()
    dist.all_reduce(inside)
    return int(inside) / len(queries_QF)


def _blocks(count: int, world: World) -> list[slice]:
    """This rank's rows."""
    return [slice(first, first + ROWS) for first in range(0, count, ROWS)][world.rank :: world.size]
