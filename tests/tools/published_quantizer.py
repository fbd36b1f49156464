"""The quantizer's step on a CPU against the published formula: ``python -m tests.tools.published_quantizer``.

The published form keeps all N·K logits, multiplies dense one-hot rows and takes softmax(S/τ) twice. It is written here
from its equations. ``--published FOLDER`` also runs the real one, from a checkout of github.com/TencentARC/SEED-Voken
(needs einops). All forms take steps by turns on one thread. Compared are medians of CPU seconds, forward and backward.
The exit code is 1 where losses or gradients differ, and 2 without the published code.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.errors import UserError
from ibq_scale.quantize.ibq import ibq_dense
from ibq_scale.quantize.quantizer import quantize

PICTURE = 256
"""Tokens of a picture: 16 × 16."""
ENTROPY_WEIGHT = 0.05
TOLERANCE = 1e-4

Step = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""One step: the loss, ∂L/∂z (N, D) and ∂L/∂C (K, D)."""


def published_formula(z_BDT: Tensor, codebook_KD: Tensor, settings: QuantizerConfig) -> tuple[Tensor, Tensor]:
    """z_q (B, D, T) and the loss, as the published equations read (arXiv 2412.02692 and its code)."""
    logits_BKT = torch.einsum("bdt,kd->bkt", z_BDT, codebook_KD)
    soft_BKT = logits_BKT.softmax(dim=1)
    hard_BKT = torch.zeros_like(logits_BKT).scatter_(1, soft_BKT.max(dim=1, keepdim=True)[1], 1.0)
    z_q_BDT = torch.einsum("bkt,kd->bdt", hard_BKT - soft_BKT.detach() + soft_BKT, codebook_KD)
    code_BDT = torch.einsum("bkt,kd->bdt", hard_BKT, codebook_KD)
    loss = (z_q_BDT - z_BDT).square().mean() + (code_BDT.detach() - z_BDT).square().mean()
    loss = loss + settings.beta * (code_BDT - z_BDT.detach()).square().mean()
    scaled_NK = logits_BKT.transpose(1, 2).flatten(0, 1) / settings.entropy_temperature
    q_NK, log_q_NK = scaled_NK.softmax(dim=1), (scaled_NK + 1e-5).log_softmax(dim=1)
    mean_K = q_NK.mean(dim=0)
    sample_entropy = -(q_NK * log_q_NK).sum(dim=1).mean()
    batch_entropy = -(mean_K * (mean_K + 1e-5).log()).sum()
    return z_q_BDT, loss + ENTROPY_WEIGHT * (sample_entropy - batch_entropy)


def steps(tokens: int, codes: int, dim: int, published: Path | None) -> dict[str, Step]:
    """All forms on the same numbers from N(0, 1)."""
    g = torch.Generator().manual_seed(0)
    z_ND, g_ND = (torch.randn(tokens, dim, generator=g) for _ in range(2))
    rows_KD = torch.randn(codes, dim, generator=g)
    settings = QuantizerConfig(codebook_size=codes, dim=dim)

    def plain(form: Callable[[Tensor, Tensor, QuantizerConfig], tuple[Tensor, Tensor]]) -> Step:
        """Of a form whose tokens are (N, D)."""

        def step() -> tuple[Tensor, Tensor, Tensor]:
            z, rows = z_ND.clone().requires_grad_(), rows_KD.requires_grad_()
            z_q, loss = form(z, rows, settings)
            grads = torch.autograd.grad(loss + (z_q * g_ND).sum(), [z, rows])
            return loss.detach(), *grads

        return step

    def of_ours(form: Callable[..., object]) -> Step:
        def both(z: Tensor, rows: Tensor, settings: QuantizerConfig) -> tuple[Tensor, Tensor]:
            out = form(z, rows, settings)
            return out.z_q_ND, out.quantization_loss + ENTROPY_WEIGHT * out.entropy_loss

        return plain(both)

    def of_published(form: Callable[[Tensor, Tensor, QuantizerConfig], tuple[Tensor, Tensor]]) -> Step:
        def both(z: Tensor, rows: Tensor, settings: QuantizerConfig) -> tuple[Tensor, Tensor]:
            z_BDT = z.view(-1, min(PICTURE, tokens), dim).transpose(1, 2).contiguous()
            z_q_BDT, loss = form(z_BDT, rows, settings)
            return z_q_BDT.transpose(1, 2).reshape(tokens, dim), loss

        return plain(both)

    forms = {
        "ours": of_ours(quantize),
        "dense oracle": of_ours(ibq_dense),
        "published formula": of_published(published_formula),
    }
    if published is not None:
        forms["published code"] = of_published(_published_code(published))
    return forms


def _published_code(folder: Path) -> Callable[[Tensor, Tensor, QuantizerConfig], tuple[Tensor, Tensor]]:
    from tests.tools.published_step import published_module

    form = published_module(folder, "vqvae.quantize").IndexPropagationQuantize

    def run(z_BDT: Tensor, rows_KD: Tensor, settings: QuantizerConfig) -> tuple[Tensor, Tensor]:
        with torch.device("meta"):
            module = form(*rows_KD.shape, settings.beta, use_entropy_loss=True)
        del module.embedding.weight
        module.embedding.weight = rows_KD
        z_q, (quantization, _, _, entropy), _ = module(z_BDT[:, :, None])
        return z_q[:, :, 0], quantization + ENTROPY_WEIGHT * entropy

    return run


def compare(forms: dict[str, Step], turns: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """CPU seconds of `turns` steps of each form, by turns after one warm-up; the largest relative error to ours."""
    first = {name: step() for name, step in forms.items()}
    ours = next(iter(first.values()))
    off = {
        name: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, ours, strict=True))
        for name, found in first.items()
    }
    del first, ours
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(turns):
        for name, step in forms.items():
            begin = time.process_time()
            step()
            seconds[name].append(time.process_time() - begin)
    return seconds, off


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.published_quantizer", description=__doc__)
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="the published code")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--codes", type=int, default=65_536)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5, help="measured steps of each form (5)")
    words = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        forms = steps(words.tokens, words.codes, words.dim, words.published)
    except UserError as e:
        print(f"published_quantizer: {e}", file=sys.stderr)
        return 2
    seconds, off = compare(forms, words.turns)
    base = statistics.median(seconds["ours"])
    print(f"{'form':<20}{'CPU s a step':>14}{'÷ ours':>9}{'off':>10}   N = {words.tokens}, K = {words.codes}")
    for name, spent in seconds.items():
        median = statistics.median(spent)
        print(f"{name:<20}{median:>14.3f}{median / base:>9.2f}{off[name]:>10.1e}   {min(spent):.3f} … {max(spent):.3f}")
    return int(max(off.values()) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
