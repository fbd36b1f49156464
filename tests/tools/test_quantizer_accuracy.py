"""The gradients that rounding is held against are those of the dense form."""

from __future__ import annotations

import torch

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.ibq import ibq_dense
from tests.tools.quantizer_accuracy import gradients


def test_without_rounding_they_are_the_oracles() -> None:
    generator = torch.Generator().manual_seed(0)
    z, g, c = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 9, 20))
    found = gradients(z, c, g, 0.3, lambda x: x, lambda x: x)
    tokens, rows = z.clone().requires_grad_(), c.clone().requires_grad_()
    out = ibq_dense(tokens, rows, QuantizerConfig(codebook_size=20, dim=6, entropy_temperature=0.3))
    through = torch.autograd.grad((out.z_q_ND * g).sum(), [tokens, rows], retain_graph=True)
    selected = torch.zeros_like(c).index_add_(0, out.indices_N, g)
    torch.testing.assert_close(found[:2], [through[0], through[1] - selected])
    torch.testing.assert_close(found[2:], list(torch.autograd.grad(out.entropy_loss, [tokens, rows])))
