"""Rehearsals on the meta device against real tensors, and the states against DeepSpeed's own allocations."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ibq_scale.config.layers import resolve
from ibq_scale.config.run import ARRun
from ibq_scale.models.head import CHUNK_BYTES
from ibq_scale.models.layout import compute_dtype
from ibq_scale.models.norm import GroupNorm, GroupNormSiLU
from ibq_scale.models.transformer import TrainedTransformer
from ibq_scale.scaling.activation_memory import ActivationMemory, ar_activation_memory, logit_bytes
from ibq_scale.scaling.allocations import Allocations, NormShapes, as_on_cuda, rounded, storage_bytes
from ibq_scale.scaling.budget import ar_budget
from ibq_scale.scaling.flops import on_meta
from ibq_scale.scaling.networks import transformer
from ibq_scale.zero.memory import Zero, engine_states
from tests.ranks import run_ranks

# Torch's CPU build keeps a dropout's mask as wide as its input, so without dropout the two must agree.
STILL = ("model.token_dropout=0", "model.residual_dropout=0", "model.ffn_dropout=0", "train.micro_batch=4")
SIZES = [
    ("model.depth=2", "model.width=128"),
    ("model.depth=5", "model.width=64", "model.codebook_size=4096", "model.tokens=64"),
    ("model.depth=3", "model.qk_norm=true", "model.conditioning=prefix"),
]


def _run(*overrides: str) -> ARRun:
    run = resolve("ar/tiny", [*STILL, *overrides]).config
    assert isinstance(run, ARRun)
    return run


def _on_cpu(run: ARRun) -> tuple[TrainedTransformer, torch.Tensor, torch.Tensor]:
    model = TrainedTransformer(run.model).to(compute_dtype(run))
    codes_BT = torch.zeros((run.train.micro_batch, run.model.tokens), dtype=torch.int64)
    return model, codes_BT, torch.zeros(run.train.micro_batch, dtype=torch.int64)


def _loss(model: Any, codes_BT: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    losses_BT: torch.Tensor = model(codes_BT, labels_B)
    return losses_BT.mean()


def _saved(run: ARRun) -> int:
    """Bytes that autograd keeps after a real forward pass, by its own hooks."""
    model, codes_BT, labels_B = _on_cpu(run)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(model, codes_BT, labels_B)
    del loss
    return storage_bytes(kept)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_kept_is_what_autograd_saves(size: tuple[str, ...], checkpointing: str, precision: str) -> None:
    run = _run(*size, f"train.precision={precision}", f"model.activation_checkpointing={checkpointing}")
    held = ar_activation_memory(run, keeps_gradients=False)
    assert held.kept == pytest.approx(_saved(run), rel=0.03)
    assert held.peak > held.kept


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("keeps_gradients", [False, True])
def test_the_peak_is_that_of_real_passes(checkpointing: str, keeps_gradients: bool) -> None:
    # In bf16 torch's fused loss takes fp32 scratch of the head's size on CPUs, which GPUs do without.
    run = _run("train.precision=fp32", f"model.activation_checkpointing={checkpointing}", "model.depth=3")
    model, codes_BT, labels_B = _on_cpu(run)
    if not keeps_gradients:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Allocations(free=[*model.parameters(), codes_BT, labels_B, model._table_2Sp]) as memory:
        torch.autograd.backward(_loss(model, codes_BT, labels_B))
    assert ar_activation_memory(run, keeps_gradients=keeps_gradients).peak == pytest.approx(memory.peak, rel=0.01)


@pytest.mark.slow
def test_what_saves_memory_saves_it() -> None:
    none, selective, full = (
        ar_activation_memory(_run("model.depth=4", f"model.activation_checkpointing={how}"), keeps_gradients=False)
        for how in ("none", "selective", "full")
    )
    assert full.kept < selective.kept < none.kept
    assert full.peak < selective.peak < none.peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("conditioning", ["adaln", "prefix"])
def test_blocks_that_are_not_rehearsed_are_counted(conditioning: str, checkpointing: str) -> None:
    keys = [f"model.conditioning={conditioning}", f"model.activation_checkpointing={checkpointing}", "model.depth=6"]
    run = _run(*keys, "train.precision=bf16", "model.ffn_dropout=0.1")
    with on_meta():
        model = TrainedTransformer(run.model).to(torch.bfloat16)
        codes_BT, labels_B = torch.zeros((4, run.model.tokens), dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with as_on_cuda(), Allocations(free=[*model.parameters()]) as memory:
        loss = _loss(model, codes_BT, labels_B)
        kept = memory.alive
        torch.autograd.backward(loss)
    assert ar_activation_memory(run, keeps_gradients=False) == ActivationMemory(kept, memory.peak)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_by_shape_allocate_what_torch_s_own_do(dtype: torch.dtype) -> None:
    def passes(*modes: Any) -> tuple[int, int, torch.Size, torch.dtype]:
        x = torch.zeros(2, 64, 8, 8, device="meta", dtype=dtype, requires_grad=True)
        norm = GroupNorm(32, 64, device="meta", dtype=dtype)
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            memory = stack.enter_context(Allocations(free=[x, *norm.parameters()]))
            norm(x).sum().backward()
        assert x.grad is not None
        return memory.alive, memory.peak, x.grad.shape, x.grad.dtype

    assert passes(NormShapes()) == passes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_images_on_cuda_keep_their_input_and_statistics_alone(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 64, 8, 8, device="meta", dtype=dtype, requires_grad=True)
    norm = GroupNormSiLU(32, 64, device="meta", dtype=dtype)
    with as_on_cuda(), Allocations(free=[x, *norm.parameters()]) as memory:
        y = norm(x)
    assert memory.alive == storage_bytes([y]) + 2 * rounded(2 * 32 * 4)
    assert norm(x).grad_fn.name() == "SiluBackward0", "as before"  # type: ignore[union-attr]


def test_logits_grow_with_the_codebook_up_to_a_chunk() -> None:
    few, many = (_run(f"model.codebook_size={codes}", "train.precision=bf16") for codes in (8192, 2**18))
    assert logit_bytes(few) == 4 * 256 * 8192 * 6
    # A chunk of them, and not the 4 · 256 · 2¹⁸.
    assert logit_bytes(many) == CHUNK_BYTES * 6 / 4 < logit_bytes(few) * 32


def test_dropout_and_attention_are_those_of_cuda() -> None:
    x = torch.zeros(4, 1024, device="meta", requires_grad=True)
    with as_on_cuda(), Allocations(free=[x]) as memory:
        out = F.dropout(x, 0.1)
    assert memory.alive == 4 * 1024 * (4 + 1)
    q = torch.zeros(1, 2, 512, 64, device="meta", requires_grad=True)
    with as_on_cuda(), Allocations(free=[q]) as memory:
        mixed = F.scaled_dot_product_attention(q, q, q)
    assert memory.alive < 4 * 512 * 512
    assert out.shape == x.shape
    assert mixed.shape == q.shape


def test_bytes_are_counted_once_and_until_they_go() -> None:
    with Allocations() as memory:
        a = torch.zeros(1000)
        b = a.view(10, 100).t()
        assert memory.alive == rounded(4000) == 4096
        del a
        assert memory.alive == 4096
        del b
    assert (memory.alive, memory.peak) == (0, 4096)


LAYOUTS = [
    ("zero0", "fp32", "adam"),
    ("zero1", "bf16", "adam"),
    ("zero1", "fp32", "adam"),
    ("zero2", "bf16", "adam"),
    ("zero2", "bf16", "muon"),
    ("zero3", "bf16", "adam"),
]
ZERO_SIZES = (
    "model.depth=3",
    "model.width=256",
    "train.global_batch=16",
    "deepspeed.overrides.zero_optimization.reduce_bucket_size=1000000",
)


def _zero_run(config: str, precision: str, kind: str) -> ARRun:
    words = (f"deepspeed.config={config}", f"train.precision={precision}", f"optimizer.kind={kind}")
    return _run(*ZERO_SIZES, *words)


def _everything() -> list[torch.Tensor]:
    """Every living tensor with memory, one a storage."""
    found = {}
    gc.collect()
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            for tensor in (thing, getattr(thing, "ds_tensor", None)):
                if isinstance(tensor, torch.Tensor):
                    found[tensor.untyped_storage()._cdata] = tensor
    return list(found.values())


def _allocated(rank: int, world: int, config: str, precision: str, kind: str) -> dict[str, int]:
    """Bytes of this rank's optimizer by kind; the most alive within passes and step beyond what was before the engine,
    and within the optimizer's step beyond what was before it.
    """
    from ibq_scale.config.deepspeed import deepspeed_config
    from ibq_scale.models.optimizers import adamw
    from ibq_scale.zero.engine import make_engine, step

    run = _zero_run(config, precision, kind)
    before = storage_bytes(_everything())
    model, codes_BT, labels_B = _on_cpu(run)
    model = model.float()
    engine = make_engine(model, adamw(model, run.optimizer), deepspeed_config(run, world), torch.device("cpu"))

    def train() -> None:
        for _ in range(2):
            engine.backward(_loss(engine, codes_BT, labels_B))
            step(engine)

    train()
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    # ZeRO-3 leaves the optimizer's groups empty between steps.
    flats = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    flats = flats or [p for group in inner.param_groups for p in group["params"]]
    moments = [state[name] for state in inner.state.values() for name in state if name != "step"]
    sizes = {"master": sum(4 * p.numel() for p in flats), "moments": sum(4 * m.numel() for m in moments)}
    with Allocations(known=_everything()) as memory:
        train()
    engine.backward(_loss(engine, codes_BT, labels_B))
    step(engine)
    engine.backward(_loss(engine, codes_BT, labels_B))
    standing = _everything()
    with Allocations(known=standing) as within:
        step(engine)
    return sizes | {"peak": memory.peak - before, "step": within.peak - storage_bytes(standing)}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("config", "precision", "kind"), LAYOUTS)
def test_states_are_those_that_deepspeed_allocates(config: str, precision: str, kind: str) -> None:
    from ibq_scale.config.deepspeed import deepspeed_config

    run = _zero_run(config, precision, kind)
    zero = Zero.of(deepspeed_config(run, 2), world=2)
    network = transformer(run)
    states = engine_states(network.groups, zero, muon=network.muon)
    budget = ar_budget(run, zero, network)
    expected = sum(
        line.passes for line in budget.lines if not line.name.startswith(("fragmentation", "CUDA", "optimizer's"))
    )
    for found in run_ranks(_allocated, 2, config, precision, kind):
        if zero.stage > 0:
            assert found["master"] == states.master
        assert found["moments"] == states.moments
        assert found["peak"] == pytest.approx(expected, rel=0.1)
        # DeepSpeed steps one parameter group at a time, so its scratch is a little less than the whole share.
        assert found["step"] == pytest.approx(states.step, rel=0.2, abs=0.01 * states.moments)
