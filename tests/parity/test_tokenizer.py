"""Published tokenizer and discriminator: indices exactly, images and logits to 1e-4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ibq_scale.config.models import DiscriminatorConfig
from ibq_scale.losses.adversarial import LeCAM, discriminator_hinge, generator_non_saturating
from ibq_scale.models.discriminator import PatchDiscriminator
from ibq_scale.pretrained.loading import save_tokenizer
from ibq_scale.pretrained.models import Tokenizer
from ibq_scale.pretrained.published import export_published, import_published

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("weights", ["live", "ema"])
def test_imported_tokenizer_reproduces_indices_and_reconstruction(parity_dir: Path, weights: str) -> None:
    expected = torch.load(parity_dir / "tokenizer_small.expected.pt", weights_only=True)
    imported = import_published(parity_dir / "tokenizer_small.ckpt", ema=weights == "ema")
    tokenizer = imported.model
    assert isinstance(tokenizer, Tokenizer)
    found = (tokenizer.model_config, tokenizer.quantizer_config)
    wanted = expected["config"]
    assert found[0].channels == wanted["ddconfig"]["ch"]
    assert list(found[0].channel_multipliers) == wanted["ddconfig"]["ch_mult"]
    assert found[0].res_blocks == wanted["ddconfig"]["num_res_blocks"]
    assert found[0].z_channels == wanted["ddconfig"]["z_channels"]
    assert (found[1].codebook_size, found[1].dim) == (wanted["n_embed"], wanted["embed_dim"])
    # Attention sits at a side in pixels of the nominal resolution, which no tensor tells: at the same level is enough.
    sides = [found[0].resolution // side for side in found[0].attention_resolutions]
    assert sides == [wanted["ddconfig"]["resolution"] // side for side in wanted["ddconfig"]["attn_resolutions"]]
    codes = tokenizer.encode(expected["x"])
    assert torch.equal(codes, expected[weights]["indices"])
    reconstruction = tokenizer.decode(codes)
    torch.testing.assert_close(reconstruction, expected[weights]["reconstruction"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["live", "ema"])
def test_the_published_layout_comes_back_as_it_was(parity_dir: Path, tmp_path: Path, weights: str) -> None:
    """Same names, shapes and types; the imported half bit for bit (a model of ours holds one set of weights)."""
    file = parity_dir / "tokenizer_small.ckpt"
    save_tokenizer(tmp_path / "model", import_published(file, ema=weights == "ema").model, {})
    export_published(tmp_path / "model", tmp_path / "back.ckpt")
    original = torch.load(file, weights_only=True)["state_dict"]
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert {k: (v.shape, v.dtype) for k, v in back.items()} == {k: (v.shape, v.dtype) for k, v in original.items()}
    average = {k for k in original if k.startswith("model_ema.")}
    kept = average if weights == "ema" else (original.keys() - average) | {"model_ema.decay", "model_ema.num_updates"}
    assert len(kept) > 200
    for name in kept:
        assert torch.equal(back[name], original[name]), name


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
