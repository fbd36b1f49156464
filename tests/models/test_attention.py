"""One function, several kernels: each is chosen where it can be had, is given what it expects, computes the same."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ibq_scale.config.models import AttentionKind, TransformerConfig
from ibq_scale.errors import UserError
from ibq_scale.models import attention as module
from ibq_scale.models.attention import PACKAGES, attention, choose, describe
from ibq_scale.models.transformer import Transformer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ON_CPU: tuple[AttentionKind, ...] = ("sdpa", "sdpa_flash", "sdpa_math")
KINDS: tuple[AttentionKind, ...] = (*PACKAGES, "sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def reference(q_BTHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, causal: bool) -> Tensor:
    """The formula, in float64."""
    q, k, v = (t.double() for t in (q_BTHd, k_BSGd, v_BSGd))
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def inputs(groups: int, queries: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of 4 heads and 9 keys; the keys are a part of a longer cache."""
    g = torch.Generator().manual_seed(groups + queries)
    q = torch.randn(2, queries, 4, 64, generator=g)
    k, v = torch.randn(2, 2, 16, groups, 64, generator=g)
    return q.to(device, dtype), k.to(device, dtype)[:, :9], v.to(device, dtype)[:, :9]


def check(kind: AttentionKind, groups: int, queries: int, dtype: torch.dtype, device: torch.device) -> None:
    """Values and gradients equal the reference's."""
    found, expected = [], []
    for gradients, function in ((found, attention), (expected, None)):
        q, k, v = (t.detach().requires_grad_() for t in inputs(groups, queries, dtype, device))
        causal = queries > 1
        out = function(q, k, v, causal=causal, kind=kind) if function else reference(q, k, v, causal)
        assert out.shape == (2, queries, 4, 64)
        out.double().square().sum().backward()
        gradients += [out, q.grad, k.grad, v.grad]
    for a, b in zip(found, expected, strict=True):
        scale = float(b.detach().abs().max())
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=TOLERANCE[dtype] * max(scale, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [9, 1])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("kind", ON_CPU)
def test_kernels_equal_the_formula(kind: AttentionKind, groups: int, queries: int, dtype: torch.dtype) -> None:
    """In training, and for one query against a cache; also where heads share keys."""
    check(kind, groups, queries, dtype, CPU)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: the kernels for GPUs run on nothing else"
)
@pytest.mark.parametrize("queries", [9, 1])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_for_gpus_equal_the_formula(kind: AttentionKind, groups: int, queries: int) -> None:
    try:
        choose(kind, CUDA, torch.bfloat16, 64)
    except UserError as e:
        pytest.skip(str(e))
    check(kind, groups, queries, torch.bfloat16, CUDA)


class FakePackage:
    """Stands in for a flash-attn package: takes what it takes, computes the reference, remembers the calls."""

    def __init__(self, answers_lse: bool) -> None:
        self.answers_lse = answers_lse
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...], bool]] = []
        self.deterministic = False

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> Any:
        self.deterministic = deterministic
        assert q.dtype in (torch.bfloat16, torch.float16)
        assert q.shape[2] % k.shape[2] == 0
        assert k.shape == v.shape
        self.calls.append((tuple(q.shape), tuple(k.shape), causal))
        out = reference(q, k, v, causal).to(q.dtype)
        return (out, torch.empty(0)) if self.answers_lse else out


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakePackage]:
    """All of the packages, on a Hopper GPU unless a test says otherwise."""
    fakes = {kind: FakePackage(answers_lse=kind == "flash4") for kind in PACKAGES}
    for name in {part for p in PACKAGES.values() for part in ("flash_attn", p.module)}:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for kind, package in PACKAGES.items():
        sys.modules[package.module].flash_attn_func = fakes[kind].flash_attn_func  # type: ignore[attr-defined]
    _gpu(monkeypatch, 9)
    monkeypatch.setattr(module, "_LOADED", {})
    return fakes


def _gpu(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: f"GPU of capability {major}")


def _uninstall(monkeypatch: pytest.MonkeyPatch, kind: AttentionKind) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[kind].module, None)
    module._LOADED.clear()


@pytest.mark.parametrize(
    ("major", "order"),
    [
        (9, ["flash3", "flash4", "flash2", "sdpa"]),
        (10, ["flash4", "flash2", "sdpa"]),
        (8, ["flash2", "sdpa"]),
        (7, ["sdpa"]),
    ],
)
def test_auto_takes_the_best_that_is_installed(
    major: int, order: list[AttentionKind], packages: dict[str, FakePackage], monkeypatch: pytest.MonkeyPatch
) -> None:
    _gpu(monkeypatch, major)
    found = []
    while not found or found[-1] != "sdpa":
        found.append(choose("auto", CUDA, torch.bfloat16, 64))
        if found[-1] != "sdpa":
            _uninstall(monkeypatch, found[-1])
    assert found == order


@pytest.mark.usefixtures("packages")
def test_auto_falls_back_to_torch_where_no_package_can() -> None:
    assert choose("auto", CPU, torch.bfloat16, 64) == "sdpa"
    assert choose("auto", CUDA, torch.float32, 64) == "sdpa"
    assert choose("auto", CUDA, torch.bfloat16, 100) == "sdpa"
    # flash-attn-4 ends at 128; Hopper's own goes on.
    assert choose("auto", CUDA, torch.bfloat16, 256) == "flash3"


@pytest.mark.parametrize("kind", PACKAGES)
@pytest.mark.parametrize(("groups", "queries"), [(4, 9), (2, 9), (1, 1)])
def test_a_package_is_called_as_it_is_made(
    kind: AttentionKind, groups: int, queries: int, packages: dict[str, FakePackage]
) -> None:
    """(B, T, H, d), grouped heads as they are, no mask for one query: packages align masks otherwise than torch."""
    assert choose(kind, CUDA, torch.bfloat16, 64) == kind
    q, k, v = inputs(groups, queries, torch.bfloat16, CPU)
    out = attention(q, k, v, causal=queries > 1, kind=kind)
    assert packages[kind].calls == [((2, queries, 4, 64), (2, 9, groups, 64), queries > 1)]
    torch.testing.assert_close(out, attention(q, k, v, causal=queries > 1, kind="sdpa_math"), rtol=0, atol=2e-2)


@pytest.mark.parametrize("fixed", [True, False])
def test_a_fixed_order_of_sums_is_asked_for(
    fixed: bool, packages: dict[str, FakePackage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train.deterministic`: flash-attn 2 and 3 can add in one, and 4 is passed over."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: fixed)
    for kind, package in packages.items():
        if kind == "flash4" and fixed:
            with pytest.raises(UserError, match=r"flash4 has no order of sums to keep to \(train.deterministic\)"):
                choose(kind, CUDA, torch.bfloat16, 64)
            continue
        choose(kind, CUDA, torch.bfloat16, 64)
        attention(*inputs(2, 9, torch.bfloat16, CPU), causal=True, kind=kind)
        assert package.deterministic == fixed, kind
    _uninstall(monkeypatch, "flash3")
    assert choose("auto", CUDA, torch.bfloat16, 64) == ("flash2" if fixed else "flash4")


@pytest.mark.parametrize(
    ("kind", "device", "dtype", "head_dim", "said"),
    [
        (
            "flash2",
            CPU,
            torch.bfloat16,
            64,
            "model.attention=flash2 needs a CUDA device, this is cpu: take auto, or sdpa",
        ),
        ("sdpa_cudnn", CPU, torch.bfloat16, 64, "needs a CUDA device"),
        ("sdpa_efficient", CPU, torch.float32, 64, "needs a CUDA device"),
        ("flash3", CUDA, torch.float32, 64, r"bf16 only \(train.precision\), this is float32"),
        ("flash4", CUDA, torch.bfloat16, 256, "multiples of 8 up to 128, these have 256"),
        ("flash2", CUDA, torch.bfloat16, 100, "multiples of 8 up to 256, these have 100"),
    ],
)
@pytest.mark.usefixtures("packages")
def test_what_is_forced_and_impossible_is_refused(
    kind: AttentionKind, device: torch.device, dtype: torch.dtype, head_dim: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        choose(kind, device, dtype, head_dim)


@pytest.mark.usefixtures("packages")
def test_a_package_that_is_missing_or_of_other_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _uninstall(monkeypatch, "flash3")
    with pytest.raises(UserError, match="needs the package flash-attn 3, which cannot be imported"):
        choose("flash3", CUDA, torch.bfloat16, 64)
    _gpu(monkeypatch, 7)
    with pytest.raises(UserError, match="flash2 does not support GPU of capability 7"):
        choose("flash2", CUDA, torch.bfloat16, 64)


def test_the_choice_is_told_in_words() -> None:
    assert describe("flash3", CUDA) == "flash3 (flash-attn 3)"
    assert "cuDNN, flash" in describe("sdpa", CUDA)
    assert describe("sdpa", CPU) == "sdpa (torch)"


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
@pytest.mark.parametrize("kind", PACKAGES)
@pytest.mark.usefixtures("packages")
def test_a_package_does_not_part_a_compiled_block(
    kind: AttentionKind, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the package's function itself is one that the compiler takes."""
    monkeypatch.setattr(sys.modules[PACKAGES[kind].module], "flash_attn_func", _plain_flash, raising=False)
    sizes = {"codebook_size": 64, "classes": 5, "tokens": 16, "depth": 2, "heads": 4, "width": 64, "kv_heads": 2}
    model = Transformer(TransformerConfig(**sizes, activation_checkpointing=checkpointing)).bfloat16()
    monkeypatch.setattr("ibq_scale.models.transformer.choose", lambda *_, **__: choose(kind, CUDA, torch.bfloat16, 64))
    torch._dynamo.reset()
    counters.clear()
    model.compile_regions()
    model.hidden(torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)).float().sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def _plain_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    return attention(q, k, v, causal=causal, kind="sdpa_flash")
