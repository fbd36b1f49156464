"""Published AR model: logits to 1e-4, loss to 1e-5, greedy guided codes exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ibq_scale.pretrained.published import import_published

pytestmark = pytest.mark.parity


def test_imported_transformer_reproduces_logits_loss_and_greedy_codes(parity_dir: Path) -> None:
    expected = torch.load(parity_dir / "ar_small.expected.pt", weights_only=True)
    config = expected["config"]
    file = parity_dir / "ar_small.ckpt"
    model = import_published(file, heads=config["n_head"], tokens=config["block_size"]).model
    with torch.no_grad():
        logits = model.forward(expected["codes"], expected["labels"].flatten())
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
    loss = F.cross_entropy(logits.flatten(0, 1), expected["codes"].flatten())
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-5, atol=1e-5)
    codes = model.generate(expected["greedy_labels"].flatten(), guidance=expected["greedy_cfg_scale"], greedy=True)
    assert torch.equal(codes, expected["greedy_codes"])
