"""Codes from the transformer, one at a time, with a KV cache and classifier-free guidance."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ibq_scale.models.transformer import KVCache, Transformer


@dataclass(frozen=True)
class SamplingSettings:
    """`top_k` 0 and `top_p` 1 keep every code; `greedy` takes the likeliest and ignores the rest but guidance."""

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling needs temperature > 0, top_k >= 0 and 0 < top_p <= 1")


@torch.no_grad()
def generate(model: Transformer, labels_B: Tensor, settings: SamplingSettings, ids_B: Tensor | None = None) -> Tensor:
    """Codes int64 (B, tokens) for labels int64 (B,).

    Row i's randomness is a pure function of (seed, ids_B[i]) (default: its place in the batch), so the same images
    come out however they are batched. Guidance: uncond + (cond − uncond) · guidance, from one doubled batch.
    """
    config = model.config
    labels_B = labels_B.to(model.head.weight.device)
    guided = settings.guidance != 1.0
    batch = len(labels_B)
    uniform_BT = _uniform(settings.seed, range(batch) if ids_B is None else ids_B.tolist(), config.tokens)
    uniform_BT = uniform_BT.to(labels_B.device)
    labels = torch.cat([labels_B, torch.full_like(labels_B, config.classes)]) if guided else labels_B
    cache = KVCache(config, len(labels), labels.device, model.head.weight.dtype)
    codes: list[Tensor] = []
    for t in range(config.tokens):
        last = None if not codes else codes[-1].repeat(2) if guided else codes[-1]
        logits = model.step(last, labels, cache).float()
        if guided:
            conditional, free = logits.chunk(2)
            logits = free + (conditional - free) * settings.guidance
        codes.append(_pick(logits, uniform_BT[:, t], settings))
    return torch.stack(codes, dim=1)


def _uniform(seed: int, ids: range | list[int], steps: int) -> Tensor:
    """One number in [0, 1) a row and step, float64, from a generator of the row's own on the CPU."""
    rows = []
    for row in ids:
        digest = hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def _pick(logits_BV: Tensor, uniform_B: Tensor, settings: SamplingSettings) -> Tensor:
    if settings.greedy:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV / settings.temperature
    if settings.top_k and settings.top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(settings.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    if settings.top_p < 1.0:
        logits_BV = _keep_nucleus(logits_BV, settings.top_p)
    # Inverse of the cumulative distribution, in float64 so that 262,144 small terms do not drift.
    cumulative_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[-1] - 1)


def _keep_nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest codes whose probabilities reach `top_p`; the likeliest always stays."""
    ordered, order = logits_BV.sort(dim=-1, descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
    return logits_BV.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), -torch.inf)
