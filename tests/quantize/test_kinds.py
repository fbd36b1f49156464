"""Every kind of quantizer, by the table that the whole package reads."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from ibq_scale.config.layers import resolve
from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.kinds import KINDS
from ibq_scale.quantize.quantizer import batch_sums, encode, initial_codebook, lookup, quantize

SETTINGS = {
    "ibq": QuantizerConfig(kind="ibq", codebook_size=32, dim=5),
    "vq": QuantizerConfig(kind="vq", codebook_size=32, dim=5),
    "simvq": QuantizerConfig(kind="simvq", codebook_size=32, dim=5),
    "lfq": QuantizerConfig(kind="lfq", codebook_size=32, dim=5),
    "fsq": QuantizerConfig(kind="fsq", codebook_size=120, dim=3, levels=(8, 5, 3)),
}


def test_the_table_has_what_a_config_may_name() -> None:
    assert set(KINDS) == set(get_args(QuantizerConfig.model_fields["kind"].annotation)) == set(SETTINGS)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_in_training_are_those_of_encode_and_lookup(kind: str) -> None:
    settings = SETTINGS[kind]
    rows_KD = initial_codebook(settings, 1, 0, settings.codebook_size)
    z_ND = torch.randn(200, settings.dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = quantize(z_ND, rows_KD, settings)
    assert torch.equal(found.indices_N, encode(z_ND.detach(), rows_KD, settings))
    assert torch.allclose(found.z_q_ND, lookup(found.indices_N, rows_KD), atol=1e-6)
    (gradient_ND,) = torch.autograd.grad(found.z_q_ND.square().sum(), z_ND)
    assert gradient_ND.isfinite().all()
    assert gradient_ND.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_the_split(kind: str) -> None:
    settings = SETTINGS[kind]
    size = settings.codebook_size
    parts = [initial_codebook(settings, 1, start, start + size // 2) for start in (0, size // 2)]
    assert torch.equal(torch.cat(parts), initial_codebook(settings, 1, 0, size))


@pytest.mark.parametrize("kind", KINDS)
def test_the_entropy_of_a_batch_is_where_the_table_says_so(kind: str) -> None:
    settings = SETTINGS[kind]
    rows_KD = initial_codebook(settings, 1, 0, settings.codebook_size)
    z_ND = torch.randn(20, settings.dim)
    if KINDS[kind].batch_sums is None:
        assert quantize(z_ND, rows_KD, settings).batch_entropy == 0
        return
    sums, count = batch_sums(z_ND, rows_KD, settings)
    assert count == 20
    assert sums.sum() == pytest.approx(20, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantizer.kind=fsq"], "required there"),
        (["quantizer.levels=[8,5]"], "are for kind=fsq"),
        (["quantizer.kind=fsq", "quantizer.levels=[8,5]"], "make dim=2 and codebook_size=40"),
        (["quantizer.kind=fsq", "quantizer.levels=[1]"], "greater than or equal to 2"),
    ],
)
def test_levels_that_do_not_fit_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resolve("tokenizer/tiny", words)
