"""The average follows the weights in fp32."""

from __future__ import annotations

import torch

from ibq_scale.models.ema import EMA


def test_the_average_is_the_closed_form_and_fp32_below_bf16_weights() -> None:
    weight = torch.tensor([1.0], dtype=torch.bfloat16)
    ema = EMA({"w": weight}, decay=0.999)
    for _ in range(100):
        ema.update({"w": torch.tensor([2.0], dtype=torch.bfloat16)})
    shadow = ema.state_dict()["w"]
    assert shadow.dtype == torch.float32
    torch.testing.assert_close(shadow, torch.tensor([2.0 - 0.999**100]))
