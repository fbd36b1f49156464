"""What rounding does to a quantizer's step on real tokens: ``python -m tests.tools.quantizer_accuracy CKPT IMAGES``.

Tokens are those of pictures in a folder by a trained tokenizer; the upstream gradient is that of the decoder's L1 loss.
Compared with gradients in fp64: products in tf32 (truncated), in bf16, and in bf16 with softmax(S/τ) from exact scores
of the candidates, as in the Triton kernels. Rounding is done here, on any device. Sums are fp64 in all of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ibq_scale.models.autoencoder import image_of, tokens_of
from ibq_scale.pretrained.loading import load_tokenizer
from ibq_scale.quantize.quantized import batch_entropy_slope
from ibq_scale.quantize.triton_backend import CUT, OPERAND

Rounding = Callable[[Tensor], Tensor]


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def _tf32(x: Tensor) -> Tensor:
    return (x.float().contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32).double()


def _exact(x: Tensor) -> Tensor:
    return x


def gradients(z: Tensor, c: Tensor, g: Tensor, temperature: float, of_p: Rounding, of_q: Rounding) -> list[Tensor]:
    """∂/∂z and ∂/∂C through softmax(S) of ⟨z_q, g⟩, and of the entropy loss, with operands rounded."""
    S, S_q = of_p(z) @ of_p(c).T, of_q(z) @ of_q(c).T
    p, q_log = S.softmax(dim=1), (S_q / temperature).log_softmax(dim=1)
    G = of_p(g) @ of_p(c).T
    through = p * (G - (p * G).sum(dim=1, keepdim=True))
    q = q_log.exp()
    entropy = -(q * q_log).sum(dim=1, keepdim=True)
    r = batch_entropy_slope(q.mean(dim=0))
    of_entropy = q / (temperature * len(z)) * (r - q @ r[:, None] - q_log - entropy)
    # The candidates' part of ∂L/∂z is added in fp32.
    return [
        of_p(through) @ of_p(c), of_p(through).T @ of_p(z), of_p(of_entropy) @ of_q(c), of_p(of_entropy).T @ of_p(z)
    ]  # fmt: skip


def report(name: str, z: Tensor, c: Tensor, g: Tensor, temperature: float) -> None:
    S, scores = z @ c.T, {"tf32": _tf32(z) @ _tf32(c).T, "bf16": _bf16(z) @ _bf16(c).T}
    wanted = gradients(z, c, g, temperature, _exact, _exact)
    print(f"{name}: N = {len(z)}, K = {len(c)}, ‖z‖ {z.norm(dim=1).mean():.2f}, ‖c‖ {c.norm(dim=1).mean():.2f}")
    for kind, rounded in scores.items():
        off = (rounded - S).square().mean().sqrt() / temperature
        changed = (rounded.argmax(dim=1) != S.argmax(dim=1)).double().mean()
        print(f"  S/τ in {kind} off by {off:.3f} nats rms; another code for {100 * changed:.2f} % of the tokens")
    bound = z.norm(dim=1)[:, None] * c.norm(dim=1).max() * 2 * OPERAND["bf16"]
    best = (scores["bf16"] - bound).amax(dim=1, keepdim=True)
    near = (scores["bf16"] + bound >= best - temperature * (math.log(len(c)) - CUT)).sum(dim=1)
    touched = S - S.amax(dim=1, keepdim=True) >= -87.3 * temperature
    tiles = touched[: len(z) // 64 * 64, : len(c) // 64 * 64].unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
    print(f"  candidates a token: mean {near.double().mean():.1f}, most {int(near.max())}")
    print(
        f"  tiles of 64 × 64 in which softmax(S/τ) is not 0: {100 * tiles.any(dim=3).any(dim=1).double().mean():.1f} %"
    )
    for kind, roundings in (("tf32", (_tf32, _tf32)), ("bf16", (_bf16, _bf16)), ("bf16, near", (_bf16, _exact))):
        off = [
            float((a - b).norm() / b.norm())
            for a, b in zip(gradients(z, c, g, temperature, *roundings), wanted, strict=True)
        ]
        print(
            f"  {kind:<11} softmax(S) z {off[0]:.4f} C {off[1]:.4f}; entropy z {off[2]:.4f} C {off[3]:.4f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--number", type=int, default=4)
    words = parser.parse_args()
    tokenizer = load_tokenizer(words.checkpoint)
    side = tokenizer.model_config.resolution
    files = sorted(path for path in words.images.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg", ".png"))
    pixels = [np.asarray(Image.open(path).convert("RGB").resize((side, side))) for path in files[: words.number]]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        z_BDhw = tokenizer.autoencoder.encode(images)
    z, c = tokens_of(z_BDhw).double(), tokenizer.codebook_KD.double()
    codes = c[(z @ c.T).argmax(dim=1)].float()
    code_image = image_of(codes, z_BDhw.shape).requires_grad_()
    (tokenizer.autoencoder.decode(code_image) - images).abs().mean().backward()
    assert code_image.grad is not None
    g = tokens_of(code_image.grad).double()
    report(str(words.checkpoint), z, c, g, tokenizer.quantizer_config.entropy_temperature)


if __name__ == "__main__":
    main()
