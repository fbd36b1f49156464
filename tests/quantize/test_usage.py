"""Usage and perplexity against their definitions."""

from __future__ import annotations

import pytest
import torch

from ibq_scale.quantize.usage import CodeUsage


def test_usage_and_perplexity_of_known_histograms() -> None:
    usage = CodeUsage(8)
    assert usage.perplexity == 0.0
    usage.update(torch.tensor([[0, 1], [2, 3]]))
    assert usage.usage == 0.5
    assert usage.perplexity == pytest.approx(4.0)
    usage.update(torch.tensor([0, 0, 0, 0]))
    counts = torch.tensor([5, 1, 1, 1]) / 8
    assert usage.perplexity == pytest.approx(float((-(counts * counts.log()).sum()).exp()))
    usage.reset()
    assert usage.usage == 0.0
