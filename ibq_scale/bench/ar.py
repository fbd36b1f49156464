"""Times training steps of the transformer by part.

The task is the trainer's own, with timers around its engine, its blocks and its loss. Parts do not overlap: DeepSpeed's
communication within a backward pass counts as communication, not as that pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ibq_scale.bench.clock import OTHER, Clock
from ibq_scale.bench.steps import DATA, StepReport, measure, report_fields
from ibq_scale.config.layers import MISSING
from ibq_scale.config.run import ARRun
from ibq_scale.data.manifest import CodesInfo, Manifest
from ibq_scale.data.sets import DataSet, DataSets, open_sets
from ibq_scale.data.store import open_store
from ibq_scale.data.stream import CodeBatch
from ibq_scale.distributed.world import World
from ibq_scale.models.transformer import Block, Transformer
from ibq_scale.scaling.auto import machine_of, settle
from ibq_scale.scaling.flops import AR_FORMULA, ar_flops
from ibq_scale.train.ar_task import ARTask
from ibq_scale.zero.engine import wrap_collectives

ATTENTION, FEED_FORWARD, HEAD = "attention", "feed-forward", "head, loss"
BLOCKS, REST, COMMUNICATION, UPDATE = "blocks, compiled", "embedding, AdaLN, norms", "communication", "optimizer, EMA"
# The functions of the loss. The task may use any of them.
LOSSES = ("cross_entropy", "linear_cross_entropy")


@dataclass(frozen=True)
class ARReport(StepReport):
    """See `StepReport`. Tokens are codes. The class prefix replaces the last one, since it is never read."""

    tokens_per_s: float
    tokens: int
    codebook_size: int
    depth: int
    width: int
    parameters: int
    activation_checkpointing: str
    compile: bool


def bench_ar(run: ARRun, world: World, *, steps: int) -> ARReport:
    """Trains for some steps from the start and measures them. Collective. UserError for configs refused by training."""
    run, _ = settle(run, machine_of(world))
    synthetic = run.data.train == MISSING
    task = _task(run, world, synthetic)
    clock = Clock(world.device)
    with _hung(clock, task):
        measured = measure(task, run, _synthetic(run) if synthetic else task.batches(0), clock, steps)
    flops = ar_flops(run.model)
    attention, feed_forward = flops["attention projections"] + flops["attention"], flops["feed-forward"]
    needs = {
        DATA: None,
        ATTENTION: attention,
        FEED_FORWARD: feed_forward,
        BLOCKS: attention + feed_forward + flops["AdaLN"],
        HEAD: flops["head"],
        REST: flops["AdaLN"] + flops["embedding"],
        COMMUNICATION: None,
        UPDATE: None,
        OTHER: None,
    }
    common = report_fields(run, world, measured, flops=sum(flops.values()), formula=AR_FORMULA, needs=needs)
    return ARReport(
        **common,
        tokens_per_s=common["images_per_s"] * run.model.tokens,
        tokens=run.model.tokens,
        codebook_size=run.model.codebook_size,
        depth=run.model.depth,
        width=run.model.width,
        parameters=sum(getattr(p, "ds_numel", p.numel()) for p in task.engine.module.parameters()),
        activation_checkpointing=run.model.activation_checkpointing,
        compile=run.model.compile,
    )


@contextmanager
def _hung(clock: Clock, task: ARTask) -> Iterator[None]:
    engine = task.engine
    timed = [(engine, "forward", REST), (engine, "backward", REST), (engine, "step", UPDATE)]
    for owner, name, part in [*timed, (task.ema, "update", UPDATE)]:
        setattr(owner, name, clock.timed(getattr(owner, name), part))
    for piece, name, part in _pieces(engine.module):
        setattr(piece, name, clock.timed_both_ways(getattr(piece, name), part))
    wrap_collectives(lambda call: clock.timed(call, COMMUNICATION))
    before = {name: getattr(F, name) for name in LOSSES}
    for name, call in before.items():
        setattr(F, name, clock.timed_both_ways(call, HEAD))
    try:
        yield
    finally:
        for name, call in before.items():
            setattr(F, name, call)


def _pieces(model: Transformer) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, method, part) for each timed call. A compiled block is timed as a whole."""
    yield model.head, "forward", HEAD
    for block in model.modules():
        if isinstance(block, Block) and block._compiled_call_impl is not None:
            yield block, "_compiled_call_impl", BLOCKS
        elif isinstance(block, Block):
            yield block.attention, "forward", ATTENTION
            yield block.feed_forward, "forward", FEED_FORWARD


def _task(run: ARRun, world: World, synthetic: bool) -> ARTask:
    if not synthetic:
        return ARTask(run, world, open_sets(run.data, "codes"))
    model = run.model
    info = CodesInfo(
        codebook_size=model.codebook_size, grid=(model.grid, model.grid), tokenizer="synthetic", source="synthetic"
    )
    manifest = Manifest(kind="codes", shards=(), classes=tuple(map(str, range(model.classes))), codes=info)
    sets = DataSets((DataSet(manifest, open_store(".")),), run.data)
    return ARTask(run.model_copy(update={"tokenizer": None}), world, sets)


def _synthetic(run: ARRun) -> Iterator[CodeBatch]:
    """One batch of random codes, repeated, in the layout of real ones."""
    size, generator = run.train.micro_batch, torch.Generator().manual_seed(0)
    codes_BT = torch.randint(run.model.codebook_size, (size, run.model.tokens), generator=generator)
    labels_B = torch.randint(run.model.classes, (size,), generator=generator)
    if torch.cuda.is_available():
        codes_BT, labels_B = codes_BT.pin_memory(), labels_B.pin_memory()
    requests = torch.zeros((size, 5), dtype=torch.int64)
    while True:
        yield CodeBatch(codes_BT, labels_B, requests)
