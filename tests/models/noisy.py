"""A small transformer whose weights are all drawn wide, so that whatever is left out of a computation shows."""

from __future__ import annotations

from typing import Any

import torch

from ibq_scale.config.models import TransformerConfig
from ibq_scale.models.transformer import Transformer

CONFIG = TransformerConfig(codebook_size=50, classes=5, tokens=16, depth=3, heads=2, width=32, adaln_gain_init=1.0)


def noisy(**changes: Any) -> Transformer:
    """`CONFIG` with these changes, for evaluation."""
    made = Transformer(CONFIG.model_copy(update=changes))
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()
