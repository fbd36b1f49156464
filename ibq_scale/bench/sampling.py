"""Times the sampling of codes: as in `sample`, step by step, and by a loop without a cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ibq_scale.bench.device import shown, wait
from ibq_scale.config.layers import preset_names, resolve
from ibq_scale.config.run import ARRun
from ibq_scale.errors import UserError
from ibq_scale.models.sampling import Sampler, SamplingSettings, generate
from ibq_scale.models.transformer import AdaLN, Transformer
from ibq_scale.pretrained.loading import load_ar
from ibq_scale.scaling.devices import known_bandwidth

# Codes are compared in fp32 always, since bf16 rounding makes equal methods differ.
COMPARED = 2


@dataclass(frozen=True)
class Way:
    """`seconds` of the fastest batch, its rates, and its speed-up over the naive loop."""

    name: str
    seconds: float
    images_per_s: float
    tokens_per_s: float
    times_naive: float


@dataclass(frozen=True)
class SamplingReport:
    """`weight_bytes`: read once a step. `cache_bytes`: all keys and values. `bound_share` (0 to 1): share of the
    tokens/s of a step that only reads its weights at the data sheet's `bandwidth` (bytes/s), None if unknown.
    `same_codes`: all methods gave the same greedy codes.
    """

    name: str
    device: str
    precision: str
    compile: bool
    batch: int
    guidance: float
    tokens: int
    parameters: int
    weight_bytes: int
    cache_bytes: int
    bandwidth: float | None
    bound_share: float | None
    same_codes: bool
    ways: tuple[Way, ...]


def naive(model: Transformer, labels_B: Tensor, guidance: float) -> Tensor:
    """The likeliest codes int64 (B, tokens), with each step computed from the whole prefix."""
    config = model.config
    batch, labels_B = len(labels_B), labels_B.to(model.head.weight.device)
    labels = torch.cat([labels_B, torch.full_like(labels_B, config.classes)])
    codes_BT = torch.zeros(batch, 0, dtype=torch.int64, device=labels.device)
    for _ in range(config.tokens):
        # A placeholder: the last code is never read.
        filled = torch.cat([codes_BT, torch.zeros_like(labels_B)[:, None]], dim=1).repeat(2, 1)
        conditional, free = model.head(model.hidden(filled, labels)[:, -1]).float().chunk(2)
        picked_B = (free + (conditional - free) * guidance).argmax(dim=-1)
        codes_BT = torch.cat([codes_BT, picked_B[:, None]], dim=1)
    return codes_BT


@torch.inference_mode()
def bench_sampling(
    source: str, device: torch.device, *, batch: int, precision: str, compiled: bool, repeats: int
) -> SamplingReport:
    """Samples whole batches greedily with guidance. UserError if `source` is neither a preset nor a model."""
    model = _model(source).to(device)
    config, guidance = model.config, 2.0
    settings = SamplingSettings(guidance=guidance, greedy=True)
    labels_B = torch.arange(batch) % config.classes
    some_B = labels_B[:COMPARED]
    expected = naive(model, some_B, guidance)
    same = torch.equal(Sampler(model, settings, len(some_B))(some_B), expected)
    if precision == "bf16":
        model.to(torch.bfloat16)
    ways: dict[str, Callable[[], Tensor]] = {"naive": lambda: naive(model, labels_B, guidance)}
    ways["cache, step by step"] = lambda: generate(model, labels_B, settings)
    seconds = {name: _fastest(way, device, 1) for name, way in ways.items()}
    sampler = Sampler(model, settings, batch)
    if compiled:
        model.compile_regions()
    # The first batch captures graphs and compiles.
    sampler(labels_B)
    seconds["sample"] = _fastest(lambda: sampler(labels_B), device, repeats)
    bandwidth = known_bandwidth(shown(device)) if device.type == "cuda" else None
    weights, tokens_per_s = step_bytes(model), batch * config.tokens / seconds["sample"]
    return SamplingReport(
        name=source,
        device=shown(device),
        precision=precision,
        compile=compiled,
        batch=batch,
        guidance=guidance,
        tokens=config.tokens,
        parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=weights,
        cache_bytes=sampler.cache.nbytes,
        bandwidth=bandwidth,
        bound_share=None if bandwidth is None else tokens_per_s / (batch * bandwidth / weights),
        same_codes=same,
        ways=tuple(
            Way(name, s, batch / s, batch * config.tokens / s, seconds["naive"] / s) for name, s in seconds.items()
        ),
    )


def step_bytes(model: Transformer) -> int:
    """Bytes of the weights read by a step, without tables (only rows are read) and the blocks' modulations."""
    kept = {p for block in model.blocks for m in block.modules() if isinstance(m, AdaLN) for p in m.parameters()}
    tables = (model.tok_emb, model.class_emb, model.condition_emb)
    kept |= {p for table in tables if table is not None for p in table.parameters()}
    return sum(p.nbytes for p in model.parameters() if p not in kept)


def _model(source: str) -> Transformer:
    name = source if source.startswith("ar/") else f"ar/{source}"
    if name not in preset_names():
        if not Path(source).exists():
            raise UserError(f"{source} is neither a preset (ibq-scale config presets) nor a model's directory")
        return load_ar(source).transformer
    run = resolve(name, (), "ar").config
    assert isinstance(run, ARRun)
    model = Transformer(run.model).eval().requires_grad_(False)
    # The initial head of zeros would give all codes the same logit.
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def _fastest(call: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
