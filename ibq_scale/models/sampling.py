"""Codes from the transformer, one at a time, with a KV cache and classifier-free guidance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ibq_scale.models.cache import KVCache
from ibq_scale.models.condition import Condition
from ibq_scale.models.initial import generator_of
from ibq_scale.models.transformer import Transformer

GuidanceSchedule = Literal["constant", "linear", "power-cosine"]
# Captured steps of one sampler, one per quarter of the codes. Early ones read only a part of the cache.
GRAPHS = 4


@dataclass(frozen=True)
class SamplingSettings:
    """`top_k` 0 and `top_p` 1 keep every code. `greedy` takes the likeliest code and uses only `guidance` of the rest.

    `guidance` is constant over all T codes, or grows from 1: ``linear`` is MAR's 1 + (g − 1)·(t + 1)/T (arXiv
    2406.11838), ``power-cosine`` RAR's 1 + (g − 1)·(1 − cos(π·(t/T)^p))/2 with `guidance_power` p (arXiv 2411.00776).
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0
    guidance_schedule: GuidanceSchedule = "constant"
    guidance_power: float = 1.0

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.guidance, self.temperature, self.top_p, self.guidance_power))):
            raise ValueError("sampling needs finite numbers")
        if self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.guidance_power <= 0:
            raise ValueError("sampling needs temperature > 0, top_k >= 0, 0 < top_p <= 1 and guidance_power > 0")

    def guidance_at(self, tokens: int) -> list[float]:
        return [1.0 + (self.guidance - 1.0) * self._share(t / tokens, (t + 1) / tokens) for t in range(tokens)]

    def _share(self, before: float, after: float) -> float:
        """A code's share of `guidance` − 1. `before` and `after`: share of codes generated without and with it."""
        if self.guidance_schedule == "constant":
            return 1.0
        if self.guidance_schedule == "linear":
            return after
        return (1 - math.cos(math.pi * before**self.guidance_power)) / 2


class Sampler:
    """Generates batches of one size, each in the same memory.

    `graphs`: every step after the first replays a CUDA graph (default: on a CUDA device). Each graph reads a fixed
    number of keys, at first a quarter of all, with a mask over unwritten ones.
    """

    def __init__(
        self, model: Transformer, settings: SamplingSettings, batch: int, *, graphs: bool | None = None
    ) -> None:
        self.model, self.settings, self.batch = model, settings, batch
        device, tokens = model.head.weight.device, model.config.tokens
        self._guided = settings.guidance != 1.0
        self.cache = KVCache(model.config, batch * (1 + self._guided), device, model.head.weight.dtype)
        self._guidance_T = torch.tensor(settings.guidance_at(tokens), device=device)
        self._uniform_BT = torch.zeros(batch, tokens, dtype=torch.float64, device=device)
        self._codes_BT = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] | None = None
        if device.type == "cuda" if graphs is None else graphs:
            self._graphs = {}

    @torch.no_grad()
    def __call__(self, labels_B: Tensor, ids_B: Tensor | None = None, condition: Condition | None = None) -> Tensor:
        """Codes int64 (B, tokens) for labels int64 (B,), or for `condition` (its labels only enter the randomness).

        Row i's randomness is a pure function of (seed, labels_B[i], ids_B[i]) (default: its row in the batch). Images
        therefore do not depend on the batching, as far as the device's products do not.
        Guidance: uncond + (cond − uncond) · guidance, from one doubled batch.
        """
        config = self.model.config
        ids = range(self.batch) if ids_B is None else ids_B.tolist()
        self._uniform_BT.copy_(_uniform(self.settings.seed, labels_B.tolist(), ids, config.tokens))
        labels = labels_B.to(self._codes_BT.device)
        condition = None if condition is None else condition.to(labels.device)
        if self._guided:
            labels = torch.cat([labels, torch.full_like(labels, config.classes)])
            if condition is not None:
                free = torch.zeros_like(condition.lengths_B)
                condition = Condition(condition.vectors_BLC.repeat(2, 1, 1), torch.cat([condition.lengths_B, free]))
        self.cache.reach = None if self._graphs is None else self._reach(0)
        self._take(self.model.begin(labels, self.cache, condition))
        for t in range(1, config.tokens):
            if self._graphs is None:
                self._step()
            else:
                self._captured(self._graphs, self._reach(t)).replay()
        return self._codes_BT.clone()

    def _step(self) -> None:
        """The next code from the last, with all inputs in the device's memory."""
        last_B = self._codes_BT.index_select(1, self.cache.position_1 - 1).squeeze(1)
        self._take(self.model.step(last_B.repeat(2) if self._guided else last_B, self.cache))

    def _take(self, logits_BV: Tensor) -> None:
        at_1 = self.cache.position_1 - 1
        logits_BV = logits_BV.float()
        if self._guided:
            conditional, free = logits_BV.chunk(2)
            logits_BV = free + (conditional - free) * self._guidance_T.index_select(0, at_1)
        uniform_B = self._uniform_BT.index_select(1, at_1).squeeze(1)
        self._codes_BT.index_copy_(1, at_1, _pick(logits_BV, uniform_B, self.settings)[:, None])

    def _reach(self, t: int) -> int:
        """Number of keys read by the graph of step t, a multiple of a quarter of all."""
        tokens = self.model.config.tokens
        span = -(-tokens // GRAPHS)
        return min(tokens, (t // span + 1) * span)

    def _captured(self, graphs: dict[int, torch.cuda.CUDAGraph], reach: int) -> torch.cuda.CUDAGraph:
        if reach in graphs:
            return graphs[reach]
        self.cache.reach = reach
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            # One run without capture for the setup of libraries and the compiler. The replay repeats the step.
            self._step()
            self.cache.position_1.sub_(1)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(graphs.values())).pool() if graphs else None
        # NCCL's watchdog thread queries its events during the capture, and must not be part of it.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._step()
        graphs[reach] = graph
        return graph


def generate(
    model: Transformer,
    labels_B: Tensor,
    settings: SamplingSettings,
    ids_B: Tensor | None = None,
    condition: Condition | None = None,
) -> Tensor:
    """One batch of `Sampler` without CUDA graphs, since capturing pays only over several batches."""
    return Sampler(model, settings, len(labels_B), graphs=False)(labels_B, ids_B, condition)


def _uniform(seed: int, labels: list[int], ids: range | list[int], steps: int) -> Tensor:
    """One number in [0, 1) per row and step, float64, from one CPU generator per row."""
    rows = []
    for label, row in zip(labels, ids, strict=True):
        generator = generator_of(f"{seed}/{label}/{row}")
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
    """Keeps the smallest set of likeliest codes with a total probability of `top_p`, at least the likeliest."""
    ordered, order = logits_BV.sort(dim=-1, descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
    return logits_BV.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), -torch.inf)
