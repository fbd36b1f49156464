"""Training steps of the tokenizer as they are trained, timed by part.

The task is the trainer's own; what is measured is hung around its engines, its losses and the quantizer. Parts overlap
nowhere: the generator's time is without the quantizer's, and what ZeRO sends within a backward pass is that pass's.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ibq_scale.bench.clock import OTHER, Clock
from ibq_scale.bench.device import peak_bytes, peak_flops
from ibq_scale.bench.flops import step_flops
from ibq_scale.config.layers import MISSING
from ibq_scale.config.run import TokenizerRun
from ibq_scale.data.sets import DataSets, open_sets
from ibq_scale.data.stream import ImageBatch
from ibq_scale.distributed.environment import World
from ibq_scale.quantize.backend import choose
from ibq_scale.train.tokenizer_task import TokenizerTask

DATA, GENERATOR, QUANTIZER = "data", "generator", "quantizer"
DISCRIMINATOR, PERCEPTUAL, UPDATE = "discriminator", "LPIPS", "optimizer, EMA, communication"
PARTS = (DATA, GENERATOR, QUANTIZER, DISCRIMINATOR, PERCEPTUAL, UPDATE, OTHER)
WARM_UP = 2


@dataclass(frozen=True)
class Part:
    """One part of a step on one rank: seconds, its share of the step (0 to 1), and the FLOPs that it needs."""

    name: str
    seconds: float
    share: float
    flops: float | None


@dataclass(frozen=True)
class TokenizerReport:
    """A step of one config. `step_s` is the median; parts are means over the same steps, of rank 0.

    `mfu` is needed FLOPs over what the device could have done, by `peak_flops` of `peak_source`. `peak_bytes` is the
    allocator's on a GPU and the whole process's on a CPU; `base_bytes` what stood before the first step.
    """

    name: str
    data: str
    device: str
    ranks: int
    threads: int
    precision: str
    compile: bool
    activation_checkpointing: bool
    resolution: int
    codebook_size: int
    global_batch: int
    micro_batch: int
    steps: int
    step_s: float
    images_per_s: float
    flops_per_image: float
    quantizer_executed: float
    peak_flops: float
    peak_source: str
    mfu: float
    base_bytes: int
    peak_bytes: int
    parts: tuple[Part, ...]


def bench_tokenizer(run: TokenizerRun, world: World, *, steps: int) -> TokenizerReport:
    """Trains for some steps from the start and measures them. Collective. UserError for what training refuses too."""
    synthetic = run.data.train == MISSING
    task = TokenizerTask(run, world, DataSets((), run.data) if synthetic else open_sets(run.data, "images"))
    clock = Clock(world.device)
    batches = _timed_batches(_synthetic(run) if synthetic else task.batches(0), clock)
    base = peak_bytes(world.device)
    _hang(clock, task)
    seconds, spent = _steps(task, batches, clock, steps)
    step_s = statistics.median(seconds)
    backend = choose(run.quantizer.backend, world.device, torch.float32, run.quantizer.dim)
    flops = step_flops(run, backend=backend, sharded=task.codebook.group_size > 1)
    images = run.train.global_batch // world.size
    needs = {
        GENERATOR: flops.autoencoder,
        QUANTIZER: flops.quantizer,
        DISCRIMINATOR: flops.discriminator,
        PERCEPTUAL: flops.perceptual,
    }
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    peak, source = peak_flops(world.device, dtype)
    cuda = world.device.type == "cuda"
    total = sum(spent.values())
    return TokenizerReport(
        name=run.name,
        data="synthetic" if synthetic else ", ".join(run.data.sources),
        device=torch.cuda.get_device_name(world.device) if cuda else "CPU",
        ranks=world.size,
        threads=torch.get_num_threads(),
        precision=run.train.precision,
        compile=run.model.compile,
        activation_checkpointing=run.model.activation_checkpointing,
        resolution=run.model.resolution,
        codebook_size=run.quantizer.codebook_size,
        global_batch=run.train.global_batch,
        micro_batch=run.train.micro_batch,
        steps=steps,
        step_s=step_s,
        images_per_s=run.train.global_batch / step_s,
        flops_per_image=flops.total,
        quantizer_executed=flops.quantizer_executed,
        peak_flops=peak,
        peak_source=source,
        mfu=flops.total * images / step_s / peak,
        base_bytes=base,
        peak_bytes=peak_bytes(world.device),
        parts=tuple(
            Part(name, spent[name] / steps, spent[name] / total, needs[name] * images if name in needs else None)
            for name in PARTS
            if name in spent
        ),
    )


def _steps(
    task: TokenizerTask, batches: Iterator[ImageBatch], clock: Clock, steps: int
) -> tuple[list[float], dict[str, float]]:
    """Seconds of each measured step, and of each part over all of them."""
    seconds: list[float] = []
    spent: dict[str, float] = {}
    for step in range(WARM_UP + steps):
        task.set_rates(step * task.run.train.global_batch)
        dist.barrier()
        clock.reset()
        task.train_step(batches)
        parts = clock.seconds()
        if step >= WARM_UP:
            seconds.append(sum(parts.values()))
            for name, value in parts.items():
                spent[name] = spent.get(name, 0.0) + value
    return seconds, spent


def _hang(clock: Clock, task: TokenizerTask) -> None:
    """Times the task's pieces from now on."""
    for engine, part in ((task.generator, GENERATOR), (task.discriminator, DISCRIMINATOR)):
        engine.forward = clock.timed(engine.forward, part)
        engine.backward = clock.timed(engine.backward, part)
        engine.step = clock.timed(engine.step, UPDATE)
    model, judge = task.generator.module, task.discriminator.module.discriminator
    both_ways = [(model, "quantize", QUANTIZER), (judge, "forward", DISCRIMINATOR)]
    if task.perceptual is not None:
        both_ways.append((task.perceptual, "forward", PERCEPTUAL))
    for owner, name, part in both_ways:
        setattr(owner, name, clock.timed_both_ways(getattr(owner, name), part))
    for owner, name in ((task.codebook, "step"), (task.ema, "update"), (task, "_update_lecam")):
        setattr(owner, name, clock.timed(getattr(owner, name), UPDATE))


def _timed_batches(batches: Iterator[ImageBatch], clock: Clock) -> Iterator[ImageBatch]:
    while True:
        with clock.part(DATA):
            batch = next(batches)
        yield batch


def _synthetic(run: TokenizerRun) -> Iterator[ImageBatch]:
    """One batch of noise, over and over, laid out as pictures come."""
    side, size = run.model.resolution, run.train.micro_batch
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (size, side, side, 3), generator=generator, dtype=torch.uint8)
    if torch.cuda.is_available():
        pixels = pixels.pin_memory()
    labels, requests = torch.zeros(size, dtype=torch.int64), torch.zeros((size, 5), dtype=torch.int64)
    while True:
        yield ImageBatch(pixels.permute(0, 3, 1, 2), labels, requests)
