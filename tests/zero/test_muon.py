"""Muon under ZeRO-1 and 2: torch.optim.Muon's own bits on any number of ranks, and after a restart on any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ibq_scale.config.run import ARRun
from ibq_scale.data.sets import open_sets
from ibq_scale.data.stream import code_stream
from ibq_scale.distributed.world import World
from tests.ranks import run_ranks
from tests.samples import write_codes
from tests.train.reference import ar_run, gather

LAYOUTS = [(config, precision) for config in ("zero1", "zero2") for precision in ("fp32", "bf16")]
HALF, END = 2, 4


def _run(codes: str, config: str, precision: str, size: int) -> ARRun:
    """Without clipping, since the norm is a sum in another order on other ranks."""
    words = (f"deepspeed.config={config}", f"train.precision={precision}", f"train.global_batch={2 * size}")
    return ar_run(codes, *words, "optimizer.kind=muon", "optimizer.grad_clip=0", "optimizer.weight_decay=0.1")


def _stream(run: ARRun, start: int = 0) -> Any:
    """The same micro-batch on every rank. Means of 1, 2 and 4 equal gradients are exact."""
    sets = open_sets(run.data, "codes")
    return code_stream(sets, seed=0, rank=0, world_size=1, micro_batch=run.train.micro_batch, start=start)


def _train(rank: int, size: int, codes: str, folder: Path, straight: bool) -> dict[str, dict[str, Any]]:
    """Weights and momenta at the end, on rank 0. `straight`: not from the checkpoint at half, but past it."""
    from ibq_scale.checkpoint.files import write_all
    from ibq_scale.train.ar_task import ARTask
    from ibq_scale.zero.engine_state import _moments
    from ibq_scale.zero.master_weights import fragments, shapes

    world, found = World(rank, size, rank, torch.device("cpu")), {}
    for config, precision in LAYOUTS:
        run = _run(codes, config, precision, size)
        task = ARTask(run, world, open_sets(run.data, "codes"))
        checkpoint = folder / f"{config}-{precision}"
        if not straight:
            task.load(checkpoint)
        batches = _stream(run, 0 if straight else HALF * run.train.micro_batch)
        for step in range(0 if straight else HALF, END):
            if straight and step == HALF:
                write_all(task.state(), checkpoint)
            task.train_step(batches)
        share, whole = fragments(task.engine, world), shapes(task.engine)
        state = gather((fragment.piece() for fragment in share), whole, world) or {}
        moments = [m._replace(name=name) for m in _moments(task.engine, share) if (name := _momentum(m.name))]
        momenta = gather(moments, {m: whole[m] for m in whole if _by_muon(m)}, world) or {}
        state |= {f"momentum/{name}": value for name, value in momenta.items()}
        found[f"{config} {precision}"] = {name: value.numpy() for name, value in state.items()}
    return found


def _momentum(name: str) -> str | None:
    kind, name = name.split("/", 1)
    assert (kind == "momentum_buffer") == _by_muon(name), "one moment of the blocks' matrices, two of the rest"
    return name if _by_muon(name) else None


def _by_muon(name: str) -> bool:
    return name.startswith("blocks.") and ("attention.w" in name or "feed_forward.w" in name)


def _plain(run: ARRun) -> dict[str, torch.Tensor]:
    """torch.optim.Muon beside torch.optim.AdamW on one process."""
    from ibq_scale.models.transformer import Transformer

    model, o = Transformer(run.model, run.train.seed), run.optimizer
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if _by_muon(n)]
    decayed = [p for n, p in named.items() if not _by_muon(n) and p.ndim > 1 and "emb" not in n]
    free = [p for n, p in named.items() if p.ndim <= 1 or "emb" in n]
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": free, "weight_decay": 0.0}]
    muon = torch.optim.Muon(matrices, o.lr, o.weight_decay, adjust_lr_fn="match_rms_adamw")
    optimizers = (muon, torch.optim.AdamW(groups, o.lr, o.betas, o.eps, fused=True))
    batches = _stream(run)
    for _ in range(END):
        batch = next(batches)
        model.losses(batch.codes, batch.labels).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    momenta = {f"momentum/{n}": muon.state[p]["momentum_buffer"] for n, p in named.items() if _by_muon(n)}
    return {n: p.detach() for n, p in named.items()} | momenta


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_and_restarts_leave_torchs_own_bits(tmp_path: Path) -> None:
    codes = tmp_path / "codes"
    write_codes(codes)
    straight = run_ranks(_train, 2, str(codes), tmp_path, True)[0]
    expected = _plain(_run(str(codes), "zero0", "fp32", 1))
    for config in ("zero1", "zero2"):
        assert straight[f"{config} fp32"].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(torch.from_numpy(straight[f"{config} fp32"][name]), value), (config, name)
    for size in (1, 2, 4):
        for layout, state in run_ranks(_train, size, str(codes), tmp_path, False)[0].items():
            different = [name for name, value in state.items() if (value != straight[layout][name]).any()]
            assert not different, (size, layout)


def _gathered(rank: int, size: int) -> bool:
    """A matrix of 7 × 5, from element 3 of a vector of 4 · 10 on: every rank has a part, two have 10 elements of it."""
    from ibq_scale.models.muon import Part
    from ibq_scale.zero.muon import gather

    matrix, partition = torch.arange(35.0).bfloat16(), 10
    start, stop = max(10 * rank - 3, 0), min(10 * rank + 7, 35)
    part = Part(torch.Size((7, 5)), start, stop - start, 3 if rank == 0 else 0)
    return torch.equal(gather(torch.empty(partition), part, matrix[start:stop])(), matrix)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_matrix_larger_than_a_partition_is_gathered_from_all_ranks() -> None:
    assert run_ranks(_gathered, 4) == [True] * 4
