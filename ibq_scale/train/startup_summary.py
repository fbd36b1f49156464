"""The summary of a run before its first step: model, data, batch, ranks, memory and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ibq_scale.config.batch import accumulation_steps, codebook_words
from ibq_scale.config.deepspeed import deepspeed_config, zero_words
from ibq_scale.config.run import AnyRun, ARRun, TokenizerRun
from ibq_scale.console import gigabytes, short
from ibq_scale.data.geometry import Stream
from ibq_scale.data.sets import DataSets
from ibq_scale.distributed.world import World
from ibq_scale.models.attention import choose, describe
from ibq_scale.models.fp8 import EAGER
from ibq_scale.models.layout import compute_dtype
from ibq_scale.quantize.backend import describe as describe_backend
from ibq_scale.scaling import networks
from ibq_scale.scaling.budget import Line, ar_states, checkpoint_bytes, tokenizer_states
from ibq_scale.scaling.networks import Network
from ibq_scale.zero.memory import Zero

WIDTH = 10


def startup_summary(config: AnyRun, world: World, hosts: Sequence[str], sets: DataSets, begin: str) -> str:
    """Several lines. `begin`: start or resume, in words.

    UserError for an attention kernel without support here, or for more shards in use than the cache holds.
    """
    zero = Zero.of(deepspeed_config(config, world.size), world=world.size)
    if isinstance(config, TokenizerRun):
        nets = [networks.autoencoder(config), networks.discriminator(config.discriminator)]
        states = tokenizer_states(config, zero, nets[0], nets[1], networks.frozen(config))
        model = _tokenizer(config, nets, world)
    else:
        nets = [networks.transformer(config)]
        states = ar_states(config, zero, nets[0])
        model = _transformer(config, nets[0], world)
    sections = {
        "model": model,
        "data": _data(config, sets, world.size, len(set(hosts))),
        "batch": [_batch(config, world, sets)],
        "ranks": [_ranks(config, world, hosts, zero)],
        "memory": [_memory(states, world)],
        "files": _files(config, checkpoint_bytes(config, nets)),
    }
    lines = [f"{config.name}: {begin}"]
    for name, (first, *more) in sections.items():
        lines += [f"  {name:<{WIDTH}}{first}", *(f"  {'':<{WIDTH}}{text}" for text in more)]
    return "\n".join(lines)


def _tokenizer(run: TokenizerRun, nets: Sequence[Network], world: World) -> list[str]:
    model, quantizer = run.model, run.quantizer
    side = model.resolution // model.downsampling
    codes = f"{quantizer.codebook_size:,} codes × {quantizer.dim} ({short(quantizer.codebook_size * quantizer.dim)})"
    how = (world.device, torch.float32, quantizer.dim, quantizer.logit_precision)
    backend = describe_backend(quantizer.backend, *how) if quantizer.kind == "ibq" else ""
    perceptual = "no LPIPS" if run.loss.perceptual == "none" else f"LPIPS {run.loss.perceptual}, frozen"
    return [
        f"{_parts(nets)}; {perceptual}",
        f"{model.resolution} × {model.resolution} pixels → {side} × {side} of {codes}, "
        f"{', '.join(filter(None, (quantizer.kind, quantizer.switches)))}{_how(run)}",
        *([f"quantizer by {backend}"] if backend else []),
    ]


def _transformer(run: ARRun, net: Network, world: World) -> list[str]:
    model = run.model
    condition = f"{model.classes:,} classes"
    masked = model.conditioning == "embedding"
    if masked:
        condition = f"up to {model.condition_tokens} vectors of {model.condition_width}"
    how = (model.attention, world.device, compute_dtype(run), model.head_dim)
    kind = describe(choose(*how, masked=masked), world.device)
    return [
        f"{short(net.parameters)}: {_parts([net])}",
        f"{model.depth} blocks × {model.width}, {model.heads} heads; {model.tokens} tokens of {model.codebook_size:,} "
        f"codes, {condition}; attention {kind}{', linear layers in fp8' * model.fp8}{_how(run)}",
        *([EAGER] if model.fp8 and not model.compile else []),
        *([f"Muon steps {short(sum(net.groups[0]))} in matrices of the blocks, AdamW the rest"] if net.muon else []),
    ]


def _how(run: AnyRun) -> str:
    again = run.model.activation_checkpointing
    words = [] if again in (False, "none") else ["activation checkpointing" + f", {again}" * isinstance(again, str)]
    return "".join(f"; {word}" for word in words + ["compiled"] * run.model.compile)


def _parts(nets: Sequence[Network]) -> str:
    return ", ".join(f"{name} {short(number)}" for net in nets for name, number in net.parts.items())


def _data(config: AnyRun, sets: DataSets, ranks: int, nodes: int) -> list[str]:
    sets.require_fit(nodes)
    texts = []
    weights = config.data.weights or (None,) * len(sets.parts)
    for part, url, weight in zip(sets.parts, config.data.sources, weights, strict=True):
        manifest = part.manifest
        share = "" if weight is None else f", weight {weight:g}"
        cache = f", cached in {part.cache.folder}" if part.cache else ""
        texts.append(
            f"{url}: {manifest.samples:,} {manifest.kind}, {len(manifest.classes):,} classes, "
            f"{len(manifest.shards):,} shard{'s' * (len(manifest.shards) > 1)}, {gigabytes(manifest.bytes)}{share}"
            f"{cache}"
        )
    if isinstance(config, TokenizerRun) and config.data.aspects:
        buckets = zip(config.data.aspects, config.crop_sizes, sets.by_aspect, strict=True)
        words = [f"{name} {width} × {height} ({extent.samples:,})" for name, (width, height), extent in buckets]
        texts.append(f"aspects, with pixels and images: {', '.join(words)}")
    batch = config.train.micro_batch * ranks // nodes
    texts.append(str(Stream.of(sets.extents, config.data, sets.cache_limit, batch, nodes)))
    held = config.validation
    if held.data is not None:
        texts.append(f"validation {held.data}: {held.samples:,} at the most, every {held.every:,} steps")
    return texts


def _batch(config: AnyRun, world: World, sets: DataSets) -> str:
    train = config.train
    epochs = train.total_samples / sets.samples
    return (
        f"{train.global_batch:,} = {train.micro_batch} micro × {accumulation_steps(train, world.size)} accumulation × "
        f"{world.size} ranks; {train.total_steps:,} steps, {train.total_samples:,} images "
        f"({epochs:,.{0 if epochs >= 100 else 1}f} epochs)"
    )


def _ranks(config: AnyRun, world: World, hosts: Sequence[str], zero: Zero) -> str:
    nodes = len(set(hosts))
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    codebook = ""
    if isinstance(config, TokenizerRun) and world.size > 1:
        codebook = f"; the codebook over {codebook_words(config, world.size)}"
    return (
        f"{world.size} on {nodes} node{'s' * (nodes > 1)} ({device}); {config.train.precision}, DeepSpeed "
        f"{config.deepspeed.config} ({zero_words(zero.stage, world.size)}){codebook}"
    )


def _memory(states: Sequence[Line], world: World) -> str:
    total = sum(line.passes for line in states)
    host = sum(line.host for line in states)
    of = ""
    if world.device.type == "cuda":
        of = f" of {gigabytes(torch.cuda.get_device_properties(world.device).total_memory)}"
    largest = sorted(states, key=lambda line: -line.passes)[:3]
    parts = ", ".join(f"{line.name} {gigabytes(line.passes)}" for line in largest if line.passes)
    more = f"; {gigabytes(host)} of the host's" if host else ""
    return f"states {gigabytes(total)} a rank{of} ({parts}){more}; 'ibq-scale plan' adds what the passes need"


def _files(config: AnyRun, checkpoint: int) -> list[str]:
    run, train = Path(config.run_dir), config.train
    kept = f"the last {train.keep_checkpoints}"
    kept += f", every {train.keep_every:,}th" if train.keep_every else ""
    kept += f", the best by {train.keep_best}" if train.keep_best else ""
    texts = [
        f"{run}: metrics.jsonl every {train.log_every:,} steps, logs, report.html",
        f"checkpoints of about {gigabytes(checkpoint)} every {train.checkpoint_every:,} steps, {kept} kept"
        + (f", copied to {train.mirror}" if train.mirror else ""),
    ]
    wandb = config.wandb
    boards = [f"W&B {wandb.mode}, {wandb.project}"] * (wandb.mode != "off") + ["TensorBoard"] * config.tensorboard
    boards += config.dashboards
    return [*texts, *(["; ".join(boards)] if boards else [])]
