"""Stage 2 from codes on disk: every layout equals plain torch; held-out codes; codes that do not fit are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ibq_scale.checkpoint.files import write_all
from ibq_scale.config.run import ARRun
from ibq_scale.data.sets import open_sets
from ibq_scale.data.stream import code_stream
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.models.transformer import Transformer
from ibq_scale.supervise.compatible import check_codes
from ibq_scale.train.validation import HeldOutCodes
from tests.ranks import run_ranks
from tests.samples import write_codes
from tests.train.reference import NO_DROPOUT, STEPS, ar_run, plain_transformer, train_transformers


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_layout_with_accumulation_clipping_and_decay_equals_plain_torch(codes: str, world_size: int) -> None:
    kinds = {"adaln": [], "prefix": ["model.conditioning=prefix", "model.kv_heads=1", "model.qk_norm=true"]}
    layouts = (
        ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
        if world_size == 2
        else ["zero1", "zero3"]
    )
    runs = {
        f"{kind}, {layout}": ar_run(codes, f"deepspeed.config={layout}", *words)
        for kind, words in kinds.items()
        for layout in layouts
    }
    expected = {kind: plain_transformer(ar_run(codes, *words), STEPS) for kind, words in kinds.items()}
    found = run_ranks(train_transformers, world_size, runs)
    for name in runs:
        model, losses = expected[name.partition(",")[0]]
        weights, _ = found[0][name]
        assert weights.keys() == dict(model.named_parameters()).keys()
        for key, value in model.named_parameters():
            close = torch.allclose(torch.from_numpy(weights[key]), value.detach(), rtol=2e-4, atol=2e-5)
            assert close, f"{name}: {key}"
        mean = [sum(parts) / world_size for parts in zip(*(part[name][1] for part in found), strict=True)]
        assert mean == pytest.approx(losses, rel=1e-4), name
        assert losses[-1] < losses[0]


def _norms(rank: int, world_size: int, runs: dict[str, ARRun]) -> dict[str, list[float]]:
    """What is logged as `grad_norm`, by run."""
    from ibq_scale.train.ar_task import ARTask

    world = World(rank, world_size, rank, torch.device("cpu"))
    norms = {}
    for name, run in runs.items():
        task = ARTask(run, world, open_sets(run.data, "codes"))
        batches = task.batches(0)
        norms[name] = []
        for step in range(3):
            task.set_rates(step * 8)
            norms[name].append(float(task.train_step(batches).metrics["grad_norm"]))
    return norms


@pytest.mark.slow
@pytest.mark.distributed
def test_the_logged_norm_is_the_gradients_in_every_layout(codes: str) -> None:
    runs = {name: ar_run(codes, f"deepspeed.config={name}") for name in ("zero0", "zero1", "zero2", "zero3")}
    norms = run_ranks(_norms, 2, runs)[0]
    run = ar_run(codes)
    model = Transformer(run.model, run.train.seed)
    sets = open_sets(run.data, "codes")
    batch = next(code_stream(sets, seed=0, rank=0, world_size=1, micro_batch=8, start=0))
    F.cross_entropy(model(batch.codes, batch.labels).flatten(0, 1), batch.codes.flatten()).backward()
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    for name, found in norms.items():
        assert found[0] == pytest.approx(expected, rel=1e-4), name
        assert found == pytest.approx(norms["zero1"], rel=1e-3), name


def _validated(rank: int, world_size: int, run: ARRun) -> float:
    """The loss on held-out codes after two steps."""
    from ibq_scale.train.ar_task import ARTask

    world = World(rank, world_size, rank, torch.device("cpu"))
    task = ARTask(run, world, open_sets(run.data, "codes"))
    batches, losses = task.batches(0), {}
    for step in (1, 2):
        task.set_rates(step)
        task.train_step(batches)
        losses[step] = task.validate(step, lambda: None).values
    assert losses[1] == {}
    (validation,) = losses[2].values()
    return validation


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("held-out")
    write_codes(folder, seed=1)
    return str(folder)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_loss_on_held_out_codes(codes: str, held_out: str) -> None:
    """Every sample once on any number of ranks, and no dropout."""
    dropout = [word.replace("=0", "=0.3") for word in NO_DROPOUT]
    words = [f"validation.data={held_out}", "validation.every=2", "validation.samples=7", "train.global_batch=12"]
    run = ar_run(codes, *words, "optimizer.lr=1e-9", "deepspeed.config=zero3")
    model = Transformer(run.model, run.train.seed).eval()
    sets = open_sets(ar_run(held_out).data, "codes")
    batch = next(code_stream(sets, seed=0, rank=0, world_size=1, micro_batch=7, start=0))
    expected = F.cross_entropy(model(batch.codes, batch.labels).flatten(0, 1), batch.codes.flatten()).item()
    assert batch.codes.unique(dim=0).shape[0] > 1
    for world_size in (1, 3):
        for loss in run_ranks(_validated, world_size, ar_run(codes, *words, *dropout, "optimizer.lr=1e-9")):
            assert loss == pytest.approx(expected, rel=1e-5)
    assert run_ranks(_validated, 2, run) == pytest.approx([expected] * 2, rel=1e-5)


class _HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensors' values that Python asks for: on a GPU each waits until the device is done."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _counted(reads: _HostReads, call: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        with reads:
            return call(*args)

    return counted


def _host_reads(rank: int, world_size: int, runs: list[ARRun]) -> list[int]:
    """In the forward and backward passes of the second step of each run."""
    from ibq_scale.train.ar_task import ARTask

    counts = []
    for run in runs:
        task = ARTask(run, World(rank, world_size, rank, torch.device("cpu")), open_sets(run.data, "codes"))
        batches, reads = task.batches(0), _HostReads()  # type: ignore[no-untyped-call]
        # ZeRO-3 looks at the order of modules in the first step.
        task.train_step(batches)
        for owner, name in ((task.engine, "forward"), (task.engine, "backward"), (task.ema, "update")):
            setattr(owner, name, _counted(reads, getattr(owner, name)))
        task.train_step(batches)
        counts.append(reads.count)
    return counts


@pytest.mark.slow
@pytest.mark.distributed
def test_the_host_waits_for_the_device_nowhere_within_the_passes(codes: str) -> None:
    """DeepSpeed's own look for infinite gradients, once a step, is what is left."""
    runs = [ar_run(codes, f"deepspeed.config={c}", "train.precision=bf16", "ema_decay=0.9") for c in ("zero2", "zero3")]
    assert run_ranks(_host_reads, 1, runs) == [[0, 0]]


def test_held_out_codes_that_are_not(codes: str, held_out: str, tmp_path: Path) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    for url, said in {codes: "is what the run trains on"}.items():
        run = ar_run(codes, f"validation.data={url}")
        with pytest.raises(UserError, match=said):
            HeldOutCodes(run, world, open_sets(run.data, "codes"))
    run = ar_run(codes, f"validation.data={held_out}", "model.codebook_size=64")
    with pytest.raises(UserError, match=f"{held_out} holds codes of a codebook of 40"):
        HeldOutCodes(run, world, open_sets(run.data, "codes"))
    write_codes(tmp_path, seed=2, tokenizer="another")
    run = ar_run(codes, f"validation.data={tmp_path}")
    with pytest.raises(UserError, match="was written by another tokenizer"):
        HeldOutCodes(run, world, open_sets(run.data, "codes"))


def test_codes_that_do_not_fit_are_refused(codes: str, tokenizer_dir: Path) -> None:
    run = ar_run(codes)
    assert check_codes(run, open_sets(run.data, "codes")).grid == (4, 4)
    cases = {
        "set model.codebook_size=40": "model.codebook_size=64",
        "set model.tokens=16": "model.tokens=64",
        "set model.classes=3": "model.classes=2",
        "was written by another tokenizer": f"tokenizer={tokenizer_dir}",
    }
    for said, override in cases.items():
        run = ar_run(codes, override)
        with pytest.raises(UserError, match=said):
            check_codes(run, open_sets(run.data, "codes"))


def _resume(rank: int, world_size: int, run: ARRun, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and averages after four steps in one go, and after two, a checkpoint, and two more."""
    from ibq_scale.train.ar_task import ARTask

    world = World(rank, world_size, rank, torch.device("cpu"))
    directory = Path(folder)

    def steps(task: ARTask, first: int, last: int) -> None:
        batches = task.batches(8 * first)
        for step in range(first, last):
            task.set_rates(8 * step)
            task.train_step(batches)

    def state(task: ARTask) -> dict[str, Any]:
        weights = {k: v.detach().float().numpy() for k, v in task.engine.module.named_parameters()}
        averages = {f"ema.{k}": v.numpy() for k, v in task.ema.shadow.state_dict().items()}
        return weights | averages

    whole = ARTask(run, world, open_sets(run.data, "codes"))
    steps(whole, 0, 4)
    before = ARTask(run, world, open_sets(run.data, "codes"))
    steps(before, 0, 2)
    write_all(before.state(), directory)
    torch.distributed.barrier()
    after = ARTask(run, world, open_sets(run.data, "codes"))
    after.load(directory)
    steps(after, 2, 4)
    return state(whole), state(after)


@pytest.mark.slow
@pytest.mark.distributed
def test_bf16_with_averages_resumes_in_the_same_bits(codes: str, tmp_path: Path) -> None:
    run = ar_run(codes, "train.precision=bf16", "ema_decay=0.9")
    for whole, resumed in run_ranks(_resume, 2, run, str(tmp_path)):
        assert whole.keys() == resumed.keys()
        assert any(name.startswith("ema.") for name in whole)
        for name, value in whole.items():
            assert (value == resumed[name]).all(), name
