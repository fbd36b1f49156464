"""Linear layers in fp8: which, with what weights, and where they are refused. Real products need torchao."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ibq_scale.config.deepspeed import deepspeed_config
from ibq_scale.config.run import ARRun
from ibq_scale.errors import UserError
from ibq_scale.models.fp8 import check_fp8, use_fp8
from ibq_scale.models.transformer import Transformer
from tests.ranks import run_ranks
from tests.samples import write_codes
from tests.train.reference import ar_run, train_transformers

CUDA = torch.device("cuda", 0)
CONVERTED = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


def _run(*words: str) -> ARRun:
    return ar_run("none", "model.fp8=true", "train.precision=bf16", "deepspeed.config=zero2", *words)


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in; returns the names of the modules that it was told to convert."""
    taken: list[str] = []

    def convert(model: nn.Module, *, module_filter_fn: Any, config: Any) -> None:
        taken.extend(name for name, module in model.named_modules() if module_filter_fn(module, name))
        assert config.emulate is False

    float8 = ModuleType("torchao.float8")
    float8.convert_to_float8_training = convert  # type: ignore[attr-defined]
    float8.Float8LinearConfig = SimpleNamespace  # type: ignore[attr-defined]
    package = ModuleType("torchao")
    package.float8 = float8  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.float8", float8)
    return taken


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


@pytest.mark.parametrize("conditioning", ["adaln", "prefix"])
def test_projections_and_feed_forward_layers_and_no_others(torchao: list[str], conditioning: str) -> None:
    model = Transformer(_run(f"model.conditioning={conditioning}", "model.qk_norm=true").model)
    use_fp8(model)
    assert sorted(torchao) == sorted(f"blocks.{i}.{name}" for i in range(2) for name in CONVERTED)


def test_where_it_cannot_be_had(torchao: list[str], gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_fp8(_run(), CUDA)
    with pytest.raises(UserError, match="needs a CUDA device, this is cpu"):
        check_fp8(_run(), torch.device("cpu"))
    with pytest.raises(UserError, match=r"train\.precision=bf16, this is fp32"):
        check_fp8(_run("train.precision=fp32"), CUDA)
    with pytest.raises(UserError, match=r"multiples of 16: model\.width is 24"):
        check_fp8(_run("model.width=24"), CUDA)
    with pytest.raises(UserError, match=r"model\.kv_heads · head_dim is 8"):
        check_fp8(_run("model.heads=4", "model.kv_heads=1"), CUDA)
    with pytest.raises(UserError, match=r"zero3\.json: ZeRO-3 frees gathered weights"):
        deepspeed_config(_run("deepspeed.config=zero3"), 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UserError, match=r"capability 8\.9 or more, a GPU has 8\.6"):
        check_fp8(_run(), CUDA)


def test_without_the_package(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"pip install 'ibq-scale\[fp8\]'"):
        check_fp8(_run(), CUDA)


def test_an_exported_model_says_nothing_of_it() -> None:
    assert _run().model.architecture() == _run("model.fp8=false").model.architecture()


def _losses(model: Transformer, steps: int) -> list[float]:
    """Of learning a fixed batch."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    codes_BT = torch.randint(40, (4, 16), generator=generator)
    losses = []
    for _ in range(steps):
        loss = model.losses(codes_BT, torch.arange(4) % 3).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_transformer_learns_as_in_bf16(checkpointing: str) -> None:
    pytest.importorskip("torchao.float8", reason="torchao (the extra fp8) is not installed")
    plain = Transformer(_run(f"model.activation_checkpointing={checkpointing}").model).bfloat16()
    model = deepcopy(plain)
    parameters = dict(model.named_parameters())
    use_fp8(model, emulate=True)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    expected, found = _losses(plain, 40), _losses(model, 40)
    assert found != expected, "something is computed otherwise"
    assert expected[-1] < 0.7 * expected[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0.05, atol=0.02)


def _train_in_fp8(rank: int, size: int, runs: dict[str, ARRun]) -> Any:
    """`train_transformers`, emulated, since there is no GPU."""
    from ibq_scale.models import fp8
    from ibq_scale.zero import meta_init

    meta_init.check_fp8 = lambda run, device: None
    meta_init.use_fp8 = lambda model: fp8.use_fp8(model, emulate=True)
    return train_transformers(rank, size, runs)


@pytest.mark.slow
@pytest.mark.distributed
def test_zero_holds_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("torchao.float8", reason="torchao (the extra fp8) is not installed")
    write_codes(tmp_path)
    layouts = {"zero0": "true", "zero1": "true", "zero2": "true", "plain": "false"}
    runs = {
        name: ar_run(str(tmp_path), f"deepspeed.config={name.replace('plain', 'zero2')}", f"model.fp8={fp8}")
        for name, fp8 in layouts.items()
    }
    found = {name: weights for name, (weights, _) in run_ranks(_train_in_fp8, 2, runs)[0].items()}
    for name in ("zero1", "zero2", "plain"):
        assert found[name].keys() == found["zero0"].keys()
    difference = {
        name: max(float(abs(tensor - found["zero0"][key]).max()) for key, tensor in weights.items())
        for name, weights in found.items()
    }
    assert max(difference["zero1"], difference["zero2"]) < 1e-6
    assert 1e-5 < difference["plain"] < 1e-2
