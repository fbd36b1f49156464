"""A transformer's first weights are the same on any ranks and stage, and no rank holds the whole of it under ZeRO-3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ibq_scale.config.deepspeed import deepspeed_config
from ibq_scale.config.run import ARRun
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.models.initial import drawn
from ibq_scale.models.transformer import Transformer
from ibq_scale.pretrained.loading import load_ar, save_ar, stored
from ibq_scale.pretrained.models import ARModel
from tests.nursery import Nursery, server
from tests.ranks import run_ranks
from tests.train.reference import ar_run, gather


def _weights(rank: int, size: int, runs: list[ARRun]) -> list[dict[str, Any]]:
    """What each run's engine begins with, as its optimizer has it."""
    from ibq_scale.models.optimizers import adamw
    from ibq_scale.zero.engine import make_engine
    from ibq_scale.zero.master_weights import pieces, shapes
    from ibq_scale.zero.meta_init import build_transformer

    world = World(rank, size, rank, torch.device("cpu"))
    found = []
    for run in runs:
        config = deepspeed_config(run, size)
        model = build_transformer(run, config, world)
        engine = make_engine(model, adamw(model, run.optimizer), config, world.device)
        weights = gather(pieces(engine, world), shapes(engine), world) or {}
        found.append({name: tensor.numpy() for name, tensor in weights.items()})
    return found


def _run(*words: str) -> ARRun:
    # Sizes that neither 2 nor 3 ranks share out evenly.
    return ar_run("none", "train.global_batch=12", "model.codebook_size=37", "train.seed=5", *words)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = ARModel(_run().model, None)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    save_ar(folder, model, {})
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "configs"), [(2, ("zero0", "zero1", "zero2", "zero3", "zero3_offload")), (3, ("zero1", "zero3"))]
)
def test_first_weights_know_no_layout(size: int, configs: tuple[str, ...], model_dir: Path) -> None:
    expected = dict(Transformer(_run().model, seed=5).named_parameters())
    given = load_ar(model_dir).transformer.state_dict()
    runs, rounded, wanted = [], [], []
    for config in configs:
        drawn = _run(f"deepspeed.config={config}")
        runs += [drawn, _run(f"deepspeed.config={config}", f"init={model_dir}")]
        rounded += [False, False]
        wanted += [expected, given]
    runs.append(_run("deepspeed.config=zero3", "train.precision=bf16", "model.qk_norm=true", "model.kv_heads=1"))
    rounded.append(True)
    wanted.append(dict(Transformer(runs[-1].model, seed=5).named_parameters()))
    found = run_ranks(_weights, size, runs)[0]
    assert len(found) == len(runs)
    for run, weights, want, bf16 in zip(runs, found, wanted, rounded, strict=True):
        assert weights.keys() == want.keys()
        for name, tensor in want.items():
            exact = tensor.detach().bfloat16().float() if bf16 else tensor.detach()
            assert torch.equal(torch.from_numpy(weights[name]), exact), f"{name} under {run.deepspeed.config}"


def test_a_stored_model_is_read_in_any_pieces(model_dir: Path) -> None:
    with torch.device("meta"):
        model = Transformer(_run().model)
    values = stored(str(model_dir), model, drawn(model.initial(), 0))
    for name, tensor in load_ar(model_dir).transformer.state_dict().items():
        flat = tensor.flatten()
        for start, length in ((0, len(flat)), (len(flat) // 3, len(flat) // 2), (len(flat) - 1, 1), (5, 0)):
            assert torch.equal(values(name, start, length), flat[start : start + length]), name


def test_a_stored_model_of_other_sizes_is_refused(model_dir: Path) -> None:
    with torch.device("meta"):
        model = Transformer(_run("model.width=64").model)
    with pytest.raises(UserError, match="misshapen"):
        stored(str(model_dir), model, drawn(model.initial(), 0))


def _status(field: str) -> int:
    """Bytes, of this process: ``VmRSS`` now, ``VmHWM`` at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def _memory(rank: int, size: int, small: ARRun, large: ARRun) -> list[float]:
    """Bytes a parameter of the large model: at most until it has weights, until it has an engine; after a step."""
    from ibq_scale.models.optimizers import adamw
    from ibq_scale.zero.engine import make_engine
    from ibq_scale.zero.meta_init import build_transformer

    world = World(rank, size, rank, torch.device("cpu"))
    taken = []
    for run in (small, large):  # the small one for what imports and buffers of collectives take
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = _status("VmRSS")
        config = deepspeed_config(run, size)
        model = build_transformer(run, config, world)
        weights = _status("VmHWM")
        engine = make_engine(model, adamw(model, run.optimizer), config, world.device)
        built = _status("VmHWM")
        logits = engine(torch.zeros(1, run.model.tokens, dtype=torch.int64), torch.tensor([0]))
        engine.backward(logits.logsumexp(-1).mean())
        engine.step()
        count = sum(p.ds_numel for p in engine.module.parameters())
        taken = [(bytes_ - before) / count for bytes_ in (weights, built, _status("VmRSS"))]
    assert count > 90e6
    return taken


@pytest.mark.slow
@pytest.mark.distributed
def test_under_zero3_a_rank_holds_its_share_and_never_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, in fp32: 4 bytes a parameter; 12 with the engine's own weights and gradients; 20 with both moments."""
    # Memory that is freed goes back at once, so that what is resident is what is held.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    words = ["deepspeed.config=zero3", "train.micro_batch=1", "train.global_batch=2", "model.tokens=16"]
    # Their sizes are for models of billions: they would hold all of this one.
    buffers = ("reduce_bucket_size", "stage3_prefetch_bucket_size")
    buffers += ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    words += [f"deepspeed.overrides.zero_optimization.{name}=1000000" for name in buffers]
    small = ar_run("none", *words)
    large = ar_run("none", *words, "model.width=768", "model.heads=6", "model.depth=9", "model.codebook_size=4096")
    with server() as own:  # the C library reads that setting when a program starts
        found_by_rank = run_ranks(_memory, 2, small, large, of=Nursery(own))
    for taken in found_by_rank:
        for found, whole in zip(taken, (4, 12, 20), strict=True):
            assert found < 0.6 * whole, f"{taken} bytes a parameter"
