"""Times training steps of the tokenizer by part.

The task is the trainer's own, with timers around its engines, its losses and the quantizer. Parts do not overlap: the
generator's time excludes the quantizer's. ZeRO's communication within a backward pass counts for that pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ibq_scale.bench.clock import OTHER, Clock
from ibq_scale.bench.steps import DATA, StepReport, measure, report_fields
from ibq_scale.config.layers import MISSING
from ibq_scale.config.run import TokenizerRun
from ibq_scale.data.sets import DataSets, open_sets
from ibq_scale.data.stream import ImageBatch
from ibq_scale.distributed.world import World
from ibq_scale.quantize.backend import choose
from ibq_scale.scaling.auto import machine_of, settle
from ibq_scale.scaling.flops import step_flops, tokenizer_formula
from ibq_scale.train.tokenizer_task import TokenizerTask

GENERATOR, QUANTIZER = "generator", "quantizer"
DISCRIMINATOR, PERCEPTUAL, UPDATE = "discriminator", "LPIPS", "optimizer, EMA, communication"


@dataclass(frozen=True)
class TokenizerReport(StepReport):
    """See `StepReport`. `quantizer_executed`: FLOPs per image with the recomputation of the quantizer's backend."""

    compile: bool
    activation_checkpointing: bool
    resolution: int
    codebook_size: int
    quantizer_executed: float


def bench_tokenizer(run: TokenizerRun, world: World, *, steps: int) -> TokenizerReport:
    """Trains for some steps from the start and measures them. Collective. UserError for configs refused by training."""
    run, _ = settle(run, machine_of(world))
    synthetic = run.data.train == MISSING
    sets = DataSets((), run.data) if synthetic else open_sets(run.data, "images", run.train.global_batch)
    task = TokenizerTask(run, world, sets)
    clock = Clock(world.device)
    _hang(clock, task)
    measured = measure(task, run, _synthetic(run) if synthetic else task.batches(0), clock, steps)
    how = run.quantizer
    backend = choose(how.backend, world.device, torch.float32, how.dim, how.logit_precision)
    flops = step_flops(run, backend=backend, sharded=task.codebook.group_size > 1)
    needs = {
        DATA: None,
        GENERATOR: flops.autoencoder + flops.features,
        QUANTIZER: flops.quantizer,
        DISCRIMINATOR: flops.discriminator,
        PERCEPTUAL: flops.perceptual,
        UPDATE: None,
        OTHER: None,
    }
    common = report_fields(
        run, world, measured, flops=flops.total, formula=tokenizer_formula(run.quantizer), needs=needs
    )
    return TokenizerReport(
        **common,
        compile=run.model.compile,
        activation_checkpointing=run.model.activation_checkpointing,
        resolution=run.model.resolution,
        codebook_size=run.quantizer.codebook_size,
        quantizer_executed=flops.quantizer_executed,
    )


def _hang(clock: Clock, task: TokenizerTask) -> None:
    """Times the task's parts from now on."""
    for engine, part in ((task.generator, GENERATOR), (task.discriminator, DISCRIMINATOR)):
        engine.forward = clock.timed(engine.forward, part)
        engine.backward = clock.timed(engine.backward, part)
        engine.step = clock.timed(engine.step, UPDATE)
    model, judge = task.generator.module, task.discriminator.module.discriminator
    both_ways = [(model, "quantize", QUANTIZER), (judge, "forward", DISCRIMINATOR)]
    if task.image_loss.perceptual is not None:
        both_ways.append((task.image_loss.perceptual, "forward", PERCEPTUAL))
    for owner, name, part in both_ways:
        setattr(owner, name, clock.timed_both_ways(getattr(owner, name), part))
    for owner, name in ((task.codebook, "step"), (task.ema, "update"), (task, "_update_lecam")):
        setattr(owner, name, clock.timed(getattr(owner, name), UPDATE))


def _synthetic(run: TokenizerRun) -> Iterator[ImageBatch]:
    """One batch of noise, repeated, in the layout of real images."""
    side, size = run.model.resolution, run.train.micro_batch
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (size, side, side, 3), generator=generator, dtype=torch.uint8)
    if torch.cuda.is_available():
        pixels = pixels.pin_memory()
    labels, requests = torch.zeros(size, dtype=torch.int64), torch.zeros((size, 5), dtype=torch.int64)
    while True:
        yield ImageBatch(pixels.permute(0, 3, 1, 2), labels, requests)
