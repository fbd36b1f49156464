"""Every form of the quantizer against the published code's numbers: values to 1e-5, gradients to 1e-4 relative."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.collectives import Shards
from ibq_scale.quantize.ibq import ibq_dense
from ibq_scale.quantize.quantizer import quantize
from tests.ranks import run_ranks

pytestmark = pytest.mark.parity
CASES = ("flat", "trained_like", "peaked")


def _tokens(x_BDHW: Tensor) -> Tensor:
    return x_BDHW.permute(0, 2, 3, 1).flatten(0, 2).contiguous()


def _load(parity_dir: Path, case: str) -> tuple[dict[str, Any], QuantizerConfig, float]:
    everything = torch.load(parity_dir / "quantizer.expected.pt", weights_only=True)
    values = everything["cases"][case]
    codes, dim = values["codebook"].shape
    settings = QuantizerConfig(
        codebook_size=codes,
        dim=dim,
        beta=everything["beta"],
        entropy_temperature=everything["entropy_temperature"],
        tile_bytes=300_000,
    )
    return values, settings, everything["entropy_weight"]


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = float(expected.abs().max())
    assert float((actual - expected).abs().max()) <= tolerance * max(scale, 1e-30)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", [ibq_dense, quantize])
def test_dense_and_tiled_equal_the_published_code(parity_dir: Path, case: str, form: Any) -> None:
    values, settings, entropy_weight = _load(parity_dir, case)
    z = _tokens(values["z"]).requires_grad_()
    codebook = values["codebook"].clone().requires_grad_()
    out = form(z, codebook, settings)
    assert torch.equal(out.indices_N, values["indices"].flatten())
    for name, key in [("quantization_loss", "quant_loss"), ("entropy_loss", "entropy_loss")]:
        torch.testing.assert_close(getattr(out, name), values[key], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.sample_entropy, values["sample_entropy"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.batch_entropy, values["avg_entropy"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.z_q_ND, _tokens(values["z_q"]), rtol=1e-5, atol=1e-5)
    upstream = _tokens(values["upstream_grad"])
    ((out.z_q_ND * upstream).sum() + out.quantization_loss + entropy_weight * out.entropy_loss).backward()
    _close(z.grad, _tokens(values["grad_z"]), 1e-4)
    _close(codebook.grad, values["grad_codebook"], 1e-4)


def _sharded(rank: int, world: int, parity_dir: Path, case: str) -> tuple[Any, ...]:
    values, settings, entropy_weight = _load(parity_dir, case)
    z_all, upstream_all = _tokens(values["z"]), _tokens(values["upstream_grad"])
    share, rows = z_all.shape[0] // world, settings.codebook_size // world
    mine = slice(rank * share, (rank + 1) * share)
    z = z_all[mine].clone().requires_grad_()
    codebook = values["codebook"][rank * rows : (rank + 1) * rows].clone().requires_grad_()
    out = quantize(z, codebook, settings, Shards(dist.group.WORLD))
    # The published objective over the whole batch is the mean of the ranks' losses; its upstream term is a sum.
    loss = world * (out.z_q_ND * upstream_all[mine]).sum() + out.quantization_loss + entropy_weight * out.entropy_loss
    loss.backward()
    means = torch.stack([out.quantization_loss, out.entropy_loss]).detach()
    dist.all_reduce(means)
    return out.z_q_ND.detach(), out.indices_N, means / world, z.grad / world, codebook.grad / world


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_sharded_over_two_ranks_equals_the_published_code(parity_dir: Path, case: str) -> None:
    values, _, _ = _load(parity_dir, case)
    results = run_ranks(_sharded, 2, parity_dir, case)
    z_q, indices, _, grad_z, grad_codebook = (torch.cat([r[i] for r in results]) for i in range(5))
    means = results[0][2]
    assert torch.equal(indices, values["indices"].flatten())
    torch.testing.assert_close(z_q, _tokens(values["z_q"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(means, torch.stack([values["quant_loss"], values["entropy_loss"]]), rtol=1e-5, atol=1e-5)
    _close(grad_z, _tokens(values["grad_z"]), 1e-4)
    _close(grad_codebook, values["grad_codebook"], 1e-4)
