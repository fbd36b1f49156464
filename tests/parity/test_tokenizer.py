"""Published tokenizer and discriminator: indices exactly, images and logits to 1e-4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ibq_scale.config.models import DiscriminatorConfig
from ibq_scale.losses.adversarial import LeCAM, discriminator_hinge, generator_non_saturating
from ibq_scale.models.discriminator import PatchDiscriminator
from ibq_scale.pretrained.published import import_published

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("weights", ["live", "ema"])
def test_imported_tokenizer_reproduces_indices_and_reconstruction(parity_dir: Path, weights: str) -> None:
    expected = torch.load(parity_dir / "tokenizer_small.expected.pt", weights_only=True)
    imported = import_published(parity_dir / "tokenizer_small.ckpt", ema=weights == "ema")
    tokenizer = imported.model
    codes = tokenizer.encode(expected["x"])
    assert torch.equal(codes, expected[weights]["indices"])
    reconstruction = tokenizer.decode(codes)
    torch.testing.assert_close(reconstruction, expected[weights]["reconstruction"], rtol=1e-4, atol=1e-4)


def test_discriminator_and_its_losses_equal_the_published_ones(parity_dir: Path) -> None:
    expected = torch.load(parity_dir / "discriminator.expected.pt", weights_only=True)
    model = PatchDiscriminator(DiscriminatorConfig(channels=expected["ndf"], layers=expected["n_layers"]))
    model.load_state_dict(expected["state_dict"], strict=True)
    real, fake = model(expected["real"]), model(expected["fake"])
    torch.testing.assert_close(real, expected["logits_real"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fake, expected["logits_fake"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(discriminator_hinge(real, fake), expected["hinge"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(generator_non_saturating(fake), expected["g_loss"], rtol=1e-5, atol=1e-6)
    lecam = LeCAM(decay=0.999)
    lecam.update(real.mean(), fake.mean())
    assert float(lecam.real) == pytest.approx(expected["lecam_real"], rel=1e-4)
    assert float(lecam.fake) == pytest.approx(expected["lecam_fake"], rel=1e-4)
    torch.testing.assert_close(lecam.penalty(real, fake), expected["lecam"], rtol=1e-4, atol=1e-7)
