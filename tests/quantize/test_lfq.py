"""Lookup-free quantization against its definition over all 2^D corners."""

from __future__ import annotations

import pytest
import torch

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.lfq import corners, sign_index
from ibq_scale.quantize.quantizer import encode, initial_codebook, lookup, quantize


def _config(dim: int, **changes: object) -> QuantizerConfig:
    settings = {"kind": "lfq", "codebook_size": 2**dim, "dim": dim, "entropy_temperature": 0.7}
    return QuantizerConfig.model_validate(settings | changes)


def test_index_and_corner_are_inverse() -> None:
    everything = corners(5, 0, 32)
    assert torch.equal(sign_index(everything), torch.arange(32))
    assert everything[0].tolist() == [-1.0] * 5
    assert everything[1].tolist() == [-1.0] * 4 + [1.0]
    assert torch.equal(initial_codebook(_config(5), 0, 8, 16), everything[8:16])


def test_codes_and_entropies_are_those_of_the_softmax_over_all_corners() -> None:
    config = _config(6)
    z = torch.randn(30, 6, dtype=torch.float64).requires_grad_()
    rows = corners(6, 0, 64).double()
    out = quantize(z, rows, config)
    assert torch.equal(out.indices_N, (z @ rows.T).argmax(dim=1))
    assert torch.equal(out.z_q_ND, lookup(out.indices_N, rows))
    assert torch.equal(encode(z.detach(), rows, config), out.indices_N)
    q = (z @ rows.T / 0.7).softmax(dim=1)
    sample = torch.special.entr(q).sum(dim=1).mean()
    mean = q.mean(dim=0)
    batch = -(mean * (mean + 1e-5).log()).sum()
    torch.testing.assert_close(out.sample_entropy, sample)
    torch.testing.assert_close(out.batch_entropy, batch)
    (found,) = torch.autograd.grad(out.entropy_loss, z)
    (expected,) = torch.autograd.grad(sample - batch, z)
    torch.testing.assert_close(found, expected)


def test_beyond_nine_bits_the_batch_entropy_is_an_upper_bound() -> None:
    z = torch.randn(200, 11, dtype=torch.float64)
    rows = corners(11, 0, 2**11).double()
    mean = (z @ rows.T / 0.7).softmax(dim=1).mean(dim=0)
    bound = quantize(z, rows, _config(11)).batch_entropy
    exact = torch.special.entr(mean).sum()
    assert exact < bound < exact + 2.0


def test_a_codebook_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="codebook_size must be 2\\^dim = 64"):
        _config(6, codebook_size=60)
