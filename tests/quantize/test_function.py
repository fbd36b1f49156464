"""The operator under torch.compile, and the size of what it allocates."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from ibq_scale.bench.quantizer import Size, memory_alone
from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.quantizer import quantize


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_compiles_whole_forward_and_backward(backend: Literal["tiled", "triton"]) -> None:
    config = QuantizerConfig(codebook_size=50, dim=8, entropy_temperature=0.3, backend=backend, logit_precision="bf16")

    def loss(x_ND: Tensor, codebook_KD: Tensor) -> Tensor:
        out = quantize(x_ND.sin(), codebook_KD, config)
        return out.z_q_ND.square().mean() + out.quantization_loss + 0.1 * out.entropy_loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    g = torch.Generator().manual_seed(0)
    for tokens in (20, 33):
        x, codebook = (torch.randn(n, 8, generator=g).requires_grad_() for n in (tokens, 50))
        grads = [torch.autograd.grad(form(x, codebook), [x, codebook]) for form in (loss, compiled)]
        for eager, traced in zip(*grads, strict=True):
            torch.testing.assert_close(traced, eager)


@pytest.mark.slow
def test_memory_grows_with_tokens_plus_codes_and_not_with_their_product() -> None:
    """Peak of a process of its own, above what stands before the step: codebook, gradient, one tile of 8 MiB."""
    dim, tile = 64, 8 << 20
    settings = {"dim": dim, "tile_bytes": tile}
    for tokens, codes in ((512, 2**15), (512, 2**17), (2048, 2**15)):
        config = QuantizerConfig.model_validate(settings | {"codebook_size": codes})
        peak, base = memory_alone("tiled", Size(tokens, codes, dim), config, torch.device("cpu"))
        # z, its gradient, the upstream, z_q and its copies; the codebook and its gradient; q̄; code that is paged in.
        linear = 4 * (12 * tokens * dim + 2 * codes * dim + 4 * codes)
        assert peak - base < linear + 2 * tile + (96 << 20), (tokens, codes)
    # The yardstick can see an N×K tensor: one of them is 0.25 GiB here.
    config = QuantizerConfig.model_validate(settings | {"codebook_size": 2**15})
    peak, base = memory_alone("dense", Size(2048, 2**15, dim), config, torch.device("cpu"))
    assert peak - base > 3 * 2048 * 2**15 * 4
