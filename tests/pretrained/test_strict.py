"""What does not fit is named, all of it, and in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ibq_scale.errors import UserError
from ibq_scale.pretrained.strict import fill_strictly


def _module() -> nn.Module:
    return nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), "b": nn.Linear(2, 2)})


def _said(change: dict[str, torch.Tensor | None]) -> str:
    tensors = {k: v for k, v in (_module().state_dict() | change).items() if v is not None}
    module = _module()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(UserError) as refused:
        fill_strictly(module, tensors, Path("somewhere"))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert str(refused.value).startswith("somewhere: weights do not fit the model: ")
    return str(refused.value).removeprefix("somewhere: weights do not fit the model: ")


def test_single_tensors_are_named() -> None:
    assert _said({"a.0.bias": None, "b.weight": torch.zeros(2, 5), "c": torch.zeros(1)}) == (
        "a.0.bias missing; b.weight misshapen ((2, 5) instead of (2, 2)); c not expected"
    )


def test_what_is_wrong_as_a_whole_is_named_as_a_whole() -> None:
    whole = dict.fromkeys(["a.0.weight", "a.0.bias", "a.1.weight", "a.1.bias"])
    assert _said(whole) == "a.* (4) missing"
    assert _said(whole | {"a.1.bias": torch.zeros(2)}) == "a.0.* (2) missing; a.1.weight missing"
    assert _said({"b.weight": torch.zeros(1), "b.bias": torch.zeros(1)}) == (
        "b.* (2) misshapen (of b.weight (1,) instead of (2, 2))"
    )
    assert _said({"d.x": torch.zeros(1), "d.y": torch.zeros(1)}) == "d.* (2) not expected"


def test_what_fits_is_copied() -> None:
    module, source = _module(), _module()
    fill_strictly(module, source.state_dict(), Path("somewhere"))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in module.state_dict().items())
