"""Stage 2 from codes on disk: ZeRO-1 on two ranks equals plain torch, and codes that do not fit are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ibq_scale.checkpoint.files import write_all
from ibq_scale.config.layers import resolve
from ibq_scale.config.run import ARRun
from ibq_scale.data.sets import open_sets
from ibq_scale.data.stream import code_stream
from ibq_scale.distributed.environment import World
from ibq_scale.errors import UserError
from ibq_scale.models.transformer import Transformer
from ibq_scale.train.ar_task import check_codes
from tests.ranks import run_ranks
from tests.samples import write_codes

STEPS = 4
NO_DROPOUT = [f"model.{name}=0" for name in ("token_dropout", "residual_dropout", "ffn_dropout", "label_dropout")]
SMALL = [
    "model.codebook_size=40",
    "model.tokens=16",
    "model.classes=3",
    "model.depth=2",
    "model.width=32",
    "model.heads=2",
]


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("codes")
    write_codes(folder)
    return str(folder)


def run_of(codes: str, *overrides: str) -> ARRun:
    """Adam's eps is large, so that its step is smooth in the gradient."""
    words = [f"data.train={codes}", "train.global_batch=8", "train.micro_batch=2", "optimizer.eps=0.01"]
    run = resolve("ar/tiny", [*words, *SMALL, *NO_DROPOUT, "schedule.warmup_samples=0", *overrides]).config
    assert isinstance(run, ARRun)
    return run


def _train(rank: int, world_size: int, run: ARRun) -> tuple[dict[str, Any], list[float]]:
    from ibq_scale.train.ar_task import ARTask

    task = ARTask(run, World(rank, world_size, rank, torch.device("cpu")), open_sets(run.data, "codes"))
    batches = task.batches(0)
    losses = []
    for step in range(STEPS):
        task.set_rates(step * 8)
        losses.append(float(task.train_step(batches).metrics["loss"]))
    return {k: v.detach().numpy() for k, v in task.engine.module.named_parameters()}, losses


def plain_training(run: ARRun, steps: int) -> tuple[Transformer, list[float]]:
    """The model and its losses after some steps in plain torch on one process."""
    torch.manual_seed(run.train.seed)
    model = Transformer(run.model)
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "emb" not in n]
    free = [p for n, p in model.named_parameters() if p.ndim <= 1 or "emb" in n]
    o = run.optimizer
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, o.lr, o.betas, o.eps)
    size = run.train.global_batch
    stream = code_stream(open_sets(run.data, "codes"), seed=0, rank=0, world_size=1, micro_batch=size, start=0)
    losses = []
    for _ in range(steps):
        batch = next(stream)
        loss = F.cross_entropy(model(batch.codes, batch.labels).flatten(0, 1), batch.codes.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses


@pytest.mark.slow
@pytest.mark.distributed
def test_zero1_with_accumulation_clipping_and_decay_equals_plain_torch(codes: str) -> None:
    run = run_of(codes)
    found = run_ranks(_train, 2, run)
    model, losses = plain_training(run, STEPS)
    for weights, _ in found:
        for name, value in model.named_parameters():
            torch.testing.assert_close(torch.from_numpy(weights[name]), value.detach(), rtol=2e-4, atol=2e-5)
    mean = [sum(pair) / 2 for pair in zip(*(part for _, part in found), strict=True)]
    assert mean == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]


def test_codes_that_do_not_fit_are_refused(codes: str, tokenizer_dir: Path) -> None:
    run = run_of(codes)
    assert check_codes(run, open_sets(run.data, "codes")).grid == (4, 4)
    cases = {
        "set model.codebook_size=40": "model.codebook_size=64",
        "set model.tokens=16": "model.tokens=64",
        "set model.classes=3": "model.classes=2",
        "was written by another tokenizer": f"tokenizer={tokenizer_dir}",
    }
    for said, override in cases.items():
        run = run_of(codes, override)
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
    run = run_of(codes, "train.precision=bf16", "ema_decay=0.9")
    for whole, resumed in run_ranks(_resume, 2, run, str(tmp_path)):
        assert whole.keys() == resumed.keys()
        assert any(name.startswith("ema.") for name in whole)
        for name, value in whole.items():
            assert (value == resumed[name]).all(), name
