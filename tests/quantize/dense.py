"""The formulas past IBQ as the papers write them, dense: loops over tokens and codes, differentiated by autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig


class Dense(NamedTuple):
    """Of all tokens: the codes with gradient (N, D), the loss of each token without Region VQ's term, and that term."""

    z_q_ND: Tensor
    loss_N: Tensor
    region: Tensor
    indices_N: Tensor


def dense(z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, used_K: Tensor | None = None) -> Dense:
    """Quantizes without entropy. `used_K`: codes in the window before this batch, bool."""
    if settings.l2_normalize:
        z_ND, rows_KD = (x / x.norm(dim=1, keepdim=True) for x in (z_ND, rows_KD))
    if settings.kind == "ibq":
        S_NK = z_ND @ rows_KD.T / (settings.cosine_temperature if settings.l2_normalize else 1.0)
        indices_N = S_NK.argmax(dim=1)
        p_NK = S_NK.softmax(dim=1)
        soft_ND = p_NK @ rows_KD.detach() if settings.straight_through else 0 * z_ND
        z_q_ND = rows_KD[indices_N] + soft_ND - soft_ND.detach()
    else:
        indices_N = (z_ND[:, None] - rows_KD).square().sum(dim=2).argmin(dim=1)
        z_q_ND = _carried(z_ND, rows_KD[indices_N], indices_N, settings)
    code_ND = rows_KD[indices_N]
    on_codebook, on_commitment = (
        settings.beta if settings.beta_on == term else 1.0 for term in ("codebook", "commitment")
    )
    loss_N = on_commitment * (code_ND.detach() - z_ND).square().mean(dim=1)
    if settings.kind == "ibq" and settings.double_quantization:
        loss_N = loss_N + (z_q_ND - z_ND).square().mean(dim=1)
    if not settings.region:
        return Dense(
            z_q_ND, loss_N + on_codebook * (code_ND - z_ND.detach()).square().mean(dim=1), z_ND.new_zeros(()), indices_N
        )
    return Dense(z_q_ND, loss_N, on_codebook * _region(z_ND.detach(), rows_KD, indices_N, used_K), indices_N)


def _carried(z_ND: Tensor, code_ND: Tensor, indices_N: Tensor, settings: QuantizerConfig) -> Tensor:
    if settings.straight_through is False:
        return code_ND
    rows = []
    distance_N = (z_ND - code_ND).square().sum(dim=1)
    for n, (z, code) in enumerate(zip(z_ND, code_ND, strict=True)):
        moved = z
        if settings.straight_through == "dynamic":
            least = distance_N[indices_N == indices_N[n]].min()
            moved = (least / distance_N[n]).detach() * z
        elif settings.straight_through == "rotation":
            e, q = z / z.norm(), code / code.norm()
            r = (e + q) / (e + q).norm()
            R = torch.eye(len(z), dtype=z.dtype) - 2 * r[:, None] * r + 2 * q[:, None] * e
            moved = (R * code.norm() / z.norm()).detach() @ z
        rows.append(moved + (code - moved).detach())
    return torch.stack(rows)


def _region(z_ND: Tensor, rows_KD: Tensor, indices_N: Tensor, used_K: Tensor | None) -> Tensor:
    chosen = {int(k): z_ND[indices_N == k].mean(dim=0) for k in indices_N.unique()}
    number = {k: int((indices_N == k).sum()) for k in chosen}
    free = [k for k in range(len(rows_KD)) if k not in chosen and (used_K is None or not used_K[k])]
    sources = [k for k in chosen if number[k] > 1]
    given: dict[int, list[Tensor]] = {}
    for k in sources:
        quota = -(-number[k] * len(free) // sum(number[s] for s in sources))
        near = sorted(free, key=lambda n, t=chosen[k]: (float((rows_KD[n].detach() - t).square().sum()), n))
        for n in near[:quota]:
            given.setdefault(n, []).append(chosen[k])
    targets = chosen | {n: torch.stack(several).mean(dim=0) for n, several in given.items()}
    return torch.stack([(rows_KD[k] - t).square().mean() for k, t in targets.items()]).mean()
