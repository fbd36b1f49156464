"""Why IBQ's codebook collapses in other models, and what helps: ``python -m tests.tools.library_collapse [SEEDS]``.

SEED-Voken's issue 59 in small: an encoder that ends in a linear layer, Adam at 5e-5, the loss's weight 1. One Markdown
row a variant and width D, the mean over seeds: share of 1,024 codes in use in the last 50 of 300 steps, the share of
softmax(S) beside the chosen code (what index backpropagation gives to the other codes), the quantization loss and the
reconstruction's error.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ibq_scale import IBQ, param_groups

CODES, TOKENS, STEPS, LAST, WIDTH = 1024, 512, 300, 50, 64
NO_ENTROPY: dict[str, Any] = {"entropy_weight": 0.0}
Norm = Callable[..., nn.Module]
VARIANTS: dict[str, tuple[dict[str, Any], Norm | None]] = {
    "no entropy loss (the published class's default)": (NO_ENTROPY, None),
    "the same, initial codes of length 1": (NO_ENTROPY | {"init_scale": None}, None),
    "the same, tokens of length √D (LayerNorm)": (NO_ENTROPY, partial(nn.LayerNorm, elementwise_affine=False)),
    "entropy loss": ({}, None),
    "centred tokens (BatchNorm), no entropy loss": (NO_ENTROPY, partial(nn.BatchNorm1d, affine=False)),
    "centred tokens (BatchNorm), entropy loss": ({}, partial(nn.BatchNorm1d, affine=False)),
}


def _layers(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return layers[:-1]


def measure(dim: int, settings: dict[str, Any], norm: Norm | None, seed: int) -> list[float]:
    """Usage, share beside the chosen code, quantization loss, error."""
    torch.manual_seed(seed)
    settings = {name: dim**-0.5 if value is None else value for name, value in settings.items()}
    encoder = nn.Sequential(*_layers(WIDTH, 256, 256, dim))
    if norm is not None:
        encoder.append(norm(dim))
    decoder = nn.Sequential(*_layers(dim, 256, 256, WIDTH))
    quantizer = IBQ(dim, CODES, seed=seed, **settings)
    optimizer = torch.optim.Adam(param_groups(nn.ModuleList([encoder, quantizer, decoder]), lr=5e-5))
    mixture = torch.randn(16, WIDTH) / 2
    for step in range(STEPS):
        if step == STEPS - LAST:
            quantizer.running.reset()
        x = (torch.randn(TOKENS, 16) @ mixture).tanh()
        z = encoder(x)
        out = quantizer(z)
        error = (decoder(out.quantized) - x).square().mean()
        optimizer.zero_grad()
        (error + out.loss).backward()
        optimizer.step()
    beside = 1 - (z @ quantizer.codebook.T).softmax(dim=1).amax(dim=1)
    found = [beside.mean(), out.parts["quantization"], error]
    return [quantizer.running.usage, *(float(x.detach()) for x in found)]


def main(seeds: int) -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    print("| | D | codes in use | beside the chosen code | quantization loss | error |\n|---|---|---|---|---|---|")
    for name, (settings, norm) in VARIANTS.items():
        for dim in (32, 256):
            runs = [measure(dim, settings, norm, seed) for seed in range(seeds)]
            used, beside, loss, error = (sum(column) / seeds for column in zip(*runs, strict=True))
            print(f"| {name} | {dim} | {used:.1%} | {beside:.2g} | {loss:.3f} | {error:.3f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
