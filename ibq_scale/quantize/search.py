"""The best code of each token, tile by tile: what `encode` needs and nothing else."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from ibq_scale.quantize.collectives import Group, gather_rows, rank_in, size_of


class Score(Enum):
    """What is maximal at the chosen code."""

    DOT = "dot"
    """z·c: IBQ."""
    DISTANCE = "distance"
    """z·c − ‖c‖²/2: the nearest code (VQ)."""


def best_rows(z_ND: Tensor, rows_KD: Tensor, score: Score, tile_bytes: int, group: Group) -> Tensor:
    """Global index (N,) int64 of the best code, decided in the inputs' own precision; the lowest wins a tie."""
    z_MD = gather_rows(z_ND, group)
    codes = rows_KD.shape[0]
    step = max(1, tile_bytes // (codes * z_MD.element_size()))
    offset_K = rows_KD.square().sum(dim=1) * -0.5 if score is Score.DISTANCE else None
    tops, indices = [], []
    for z_BD in torch.split(z_MD, step):
        S = z_BD @ rows_KD.T if offset_K is None else torch.addmm(offset_K, z_BD, rows_KD.T)
        top, index = S.max(dim=1)
        tops.append(top)
        indices.append(index)
    top_M, index_M = torch.cat(tops), torch.cat(indices) + rank_in(group) * codes
    if group is None:
        return index_M
    top_WM, index_WM = gather_rows(top_M[None], group), gather_rows(index_M[None], group)
    best_M = torch.where(top_WM == top_WM.amax(dim=0), index_WM, size_of(group) * codes).amin(dim=0)
    return best_M.view(size_of(group), -1)[rank_in(group)].clone()
