"""Peak memory of a micro-batch's forward and backward pass, rehearsed on tensors without memory.

The networks are those of training, with the config's precision and checkpointing. Memory inside of operators is not
counted: workspaces of convolutions and products. torch.compile is left out, so compiled blocks need less.

A rehearsal takes a tenth of a second and more, under any micro-batch. Within `estimated`, two of them stand for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ibq_scale.config.models import AutoencoderConfig, DiscriminatorConfig, TransformerConfig
from ibq_scale.config.run import AnyRun, ARRun, TokenizerLossConfig, TokenizerRun
from ibq_scale.losses.adversarial import discriminator_hinge
from ibq_scale.losses.image import ImageLoss
from ibq_scale.models.aligned import Alignment
from ibq_scale.models.autoencoder import Autoencoder, image_of, tokens_of
from ibq_scale.models.head import chunk_tokens
from ibq_scale.models.layout import compute_dtype
from ibq_scale.models.order import Orders
from ibq_scale.models.transformer import Transformer
from ibq_scale.scaling import networks
from ibq_scale.scaling.allocations import Allocations, NormShapes, as_on_cuda
from ibq_scale.scaling.flops import (
    ANYWHERE,
    backbone_on_meta,
    discriminator_on_meta,
    features_on_meta,
    on_meta,
    perceptual_on_meta,
)

R = TypeVar("R", bound=AnyRun)


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes beyond the states. `kept`: alive between the passes. `peak`: the maximum, with gradients freed at once.

    `at_quantizer`: alive while a tokenizer's quantizer works, in either pass.
    """

    kept: int
    peak: int
    at_quantizer: int = 0


_estimating: ContextVar[bool] = ContextVar("estimating", default=False)
# Small enough to count the constant part, and large enough that another moment's peak rarely takes over beyond them.
ESTIMATED = (8, 16)


@contextmanager
def estimated() -> Iterator[None]:
    """Memory within this context is a line through two micro-batches: within 3 % for the presets, from 4 images on."""
    token = _estimating.set(True)
    try:
        yield
    finally:
        _estimating.reset(token)


def _plus(
    base: ActivationMemory, smaller: ActivationMemory, larger: ActivationMemory, times: float
) -> ActivationMemory:
    """`base` and `times` the difference of the other two."""
    found = (a + times * (c - b) for a, b, c in zip(*map(astuple, (base, smaller, larger)), strict=True))
    return ActivationMemory(*(max(0, round(bytes_)) for bytes_ in found))


def _estimate(few: ActivationMemory, many: ActivationMemory, micro_batch: int) -> ActivationMemory:
    """On the line through the rehearsals of `ESTIMATED`."""
    return _plus(many, few, many, (micro_batch - ESTIMATED[1]) / (ESTIMATED[1] - ESTIMATED[0]))


def _with_gradients(memory: ActivationMemory, bytes_: int) -> ActivationMemory:
    """At the end of the backward pass all gradients are there and nearly no activation."""
    return replace(memory, peak=max(memory.peak, bytes_))


def ar_activation_memory(run: ARRun, *, keeps_gradients: bool) -> ActivationMemory:
    """A micro-batch of the transformer, without the loss's chunk of logits.

    All blocks are equal, so without gradients each block beyond the second adds the same bytes, and two short
    transformers are rehearsed. With gradients the moment of the peak depends on the depth, so every block runs.
    """
    depth, size, dtype = run.model.depth, run.train.micro_batch, compute_dtype(run)

    def rehearsed(depth: int, micro_batch: int, *, keeps: bool = False) -> ActivationMemory:
        return _transformer(run.model.model_copy(update=ANYWHERE | {"depth": depth}), micro_batch, dtype, keeps)

    if _estimating.get() and depth > 3:
        few, many = (rehearsed(2, batch) for batch in ESTIMATED)
        # A block keeps nothing but activations, in proportion to the images.
        three = rehearsed(3, ESTIMATED[1])
        found = _plus(_estimate(few, many, size), many, three, (depth - 2) * size / ESTIMATED[1])
        gradients = networks.transformer(run).parameters * dtype.itemsize
        return _with_gradients(found, gradients) if keeps_gradients else found
    if keeps_gradients or depth <= 3:
        return rehearsed(depth, size, keeps=keeps_gradients)
    two = rehearsed(2, size)
    return _plus(two, two, rehearsed(3, size), depth - 2)


@cache
def _transformer(
    config: TransformerConfig, micro_batch: int, dtype: torch.dtype, keeps_gradients: bool
) -> ActivationMemory:
    with on_meta():
        model = Transformer(config).to(dtype)
        codes_BT = torch.zeros((micro_batch, config.tokens), dtype=torch.int64)
        labels_B = torch.zeros(micro_batch, dtype=torch.int64)
        orders = None if config.order == "raster" else Orders(codes_BT, torch.zeros(micro_batch))

    # A model with a prefix makes an empty one of full length.
    def forward() -> Tensor:
        return model.losses(codes_BT, labels_B, orders=orders).mean()

    return _rehearse(model.parameters(), forward, keeps_gradients)


def logit_bytes(run: ARRun) -> int:
    """Bytes of the loss's chunk: fp32 logits, turned into their gradient in place, and a copy in the weights' dtype."""
    tokens = min(chunk_tokens(run.model.codebook_size), run.train.micro_batch * run.model.tokens)
    return tokens * run.model.codebook_size * (4 + compute_dtype(run).itemsize)


def tokenizer_activation_memory(run: TokenizerRun, *, keeps_gradients: bool) -> ActivationMemory:
    """A micro-batch of the tokenizer as in `TokenizerTask`, without the quantizer (counted by formula)."""
    dtype = compute_dtype(run)

    def rehearsed(micro_batch: int, *, keeps: bool = False) -> ActivationMemory:
        model = run.model.model_copy(update={"compile": False})
        return _tokenizer(model, run.quantizer.dim, run.discriminator, run.loss, micro_batch, dtype, keeps)

    if _estimating.get():
        few, many = (rehearsed(batch) for batch in ESTIMATED)
        found = _estimate(few, many, run.train.micro_batch)
        gradients = networks.autoencoder(run).parameters * dtype.itemsize
        return _with_gradients(found, gradients) if keeps_gradients else found
    return rehearsed(run.train.micro_batch, keeps=keeps_gradients)


@cache
def _tokenizer(
    config: AutoencoderConfig,
    dim: int,
    sizes: DiscriminatorConfig,
    losses: TokenizerLossConfig,
    micro_batch: int,
    dtype: torch.dtype,
    keeps_gradients: bool,
) -> ActivationMemory:
    with on_meta():
        model = Autoencoder(config, dim).to(dtype)
        images = torch.zeros((micro_batch, 3, config.resolution, config.resolution))
    net = losses.perceptual
    metric = None if net == "none" else perceptual_on_meta(net, dtype)
    image_loss = ImageLoss(losses, metric)
    discriminator = discriminator_on_meta(sizes, dtype)
    target, alignment = features_on_meta(losses, config, dtype), None
    if target is not None:
        with on_meta():
            alignment = Alignment(model.decoder.mid, config, target.width).to(dtype)
    frozen = [
        *_frozen(metric),
        *_frozen(backbone_on_meta(sizes, dtype)),
        *_frozen(None if target is None else target.vit),
    ]
    judged, trained = _frozen(discriminator), [*model.parameters(), *_frozen(alignment)]

    def forward() -> Tensor:
        z_BDhw = model.encode(images)
        codes_ND = _Quantizing.apply(tokens_of(z_BDhw).float())
        reconstruction = model.decode(image_of(codes_ND.to(dtype), z_BDhw.shape))
        shown = reconstruction.detach().float()
        adversarial = discriminator if losses.adversarial_weight > 0 else None
        loss = (reconstruction * image_loss(images, shown, adversarial).gradient).sum()
        return loss if alignment is None or target is None else loss + alignment(target(images))

    def discriminate() -> Tensor:
        real, fake = discriminator(images), discriminator(torch.zeros_like(images))
        return discriminator_hinge(real.float(), fake.float())

    ours = _rehearse([*trained, *judged, *frozen], forward, keeps_gradients)
    if losses.adversarial_weight == 0:
        return ours
    theirs = _rehearse([*judged, *frozen], discriminate, keeps_gradients)
    return replace(ours, peak=max(ours.peak, theirs.peak))


class _Quantizing(torch.autograd.Function):
    """Stands for the quantizer and notes what is alive around it. Its own memory is counted by formula."""

    memory: ClassVar[Allocations]
    alive: ClassVar[int]

    @staticmethod
    def forward(ctx: Any, z_ND: Tensor) -> Tensor:
        _Quantizing.alive = max(_Quantizing.alive, _Quantizing.memory.alive)
        return z_ND * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _Quantizing.alive = max(_Quantizing.alive, _Quantizing.memory.alive)
        return grads[0] * 1.0


def _frozen(metric: nn.Module | None) -> list[Tensor]:
    return [] if metric is None else [*metric.parameters(), *metric.buffers()]


def _rehearse(parameters: Iterable[Tensor], forward: Callable[[], Tensor], keeps_gradients: bool) -> ActivationMemory:
    """Runs forward and backward. `parameters` are not counted."""
    known = list(parameters)
    if not keeps_gradients:
        for parameter in known:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
    with as_on_cuda(), NormShapes(), Allocations(free=known) as memory:
        _Quantizing.memory, _Quantizing.alive = memory, 0
        loss = forward()
        kept = memory.alive
        torch.autograd.backward(loss)
    return ActivationMemory(kept, memory.peak, _Quantizing.alive)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
