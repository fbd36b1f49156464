"""Peak memory of a micro-batch's forward and backward pass, rehearsed on tensors without memory.

The networks are those of training, with the config's precision and checkpointing. Memory inside of operators is not
counted: workspaces of convolutions and products. torch.compile is left out, so compiled blocks need less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ibq_scale.config.models import AutoencoderConfig, DiscriminatorConfig, TransformerConfig
from ibq_scale.config.run import ARRun, TokenizerLossConfig, TokenizerRun
from ibq_scale.losses.adversarial import discriminator_hinge
from ibq_scale.losses.image import ImageLoss
from ibq_scale.models.autoencoder import Autoencoder, image_of, tokens_of
from ibq_scale.models.discriminator import PatchDiscriminator
from ibq_scale.models.head import chunk_tokens
from ibq_scale.models.order import Orders
from ibq_scale.models.precision import compute_dtype
from ibq_scale.models.transformer import Transformer
from ibq_scale.scaling.allocations import Allocations, NormShapes, as_on_cuda
from ibq_scale.scaling.flops import ANYWHERE, on_meta, perceptual_on_meta


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes beyond the states. `kept`: alive between the passes. `peak`: the maximum, with gradients freed at once."""

    kept: int
    peak: int


def ar_activation_memory(run: ARRun, *, keeps_gradients: bool) -> ActivationMemory:
    """A micro-batch of the transformer, without the loss's chunk of logits.

    All blocks are equal, so without gradients each block beyond the second adds the same bytes, and two short
    transformers are rehearsed. With gradients the moment of the peak depends on the depth, so every block runs.
    """

    def of_depth(depth: int) -> ActivationMemory:
        model = run.model.model_copy(update=ANYWHERE | {"depth": depth})
        return _transformer(model, run.train.micro_batch, compute_dtype(run), keeps_gradients)

    depth = run.model.depth
    if keeps_gradients or depth <= 3:
        return of_depth(depth)
    two, three = of_depth(2), of_depth(3)
    more = depth - 2
    return ActivationMemory(two.kept + more * (three.kept - two.kept), two.peak + more * (three.peak - two.peak))


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
    model = run.model.model_copy(update={"compile": False})
    batch = run.train.micro_batch
    return _tokenizer(model, run.quantizer.dim, run.discriminator, run.loss, batch, compute_dtype(run), keeps_gradients)


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
        discriminator = PatchDiscriminator(sizes).to(dtype)
        images = torch.zeros((micro_batch, 3, config.resolution, config.resolution))
    net = losses.perceptual
    metric = None if net == "none" else perceptual_on_meta(net, dtype)
    image_loss = ImageLoss(losses, metric)

    def forward() -> Tensor:
        z_BDhw = model.encode(images)
        codes_ND = tokens_of(z_BDhw).float() * 1.0
        reconstruction = model.decode(image_of(codes_ND.to(dtype), z_BDhw.shape))
        shown = reconstruction.detach().float()
        adversarial = discriminator if losses.adversarial_weight > 0 else None
        return (reconstruction * image_loss(images, shown, adversarial).gradient).sum()

    def discriminate() -> Tensor:
        real, fake = discriminator(images), discriminator(torch.zeros_like(images))
        return discriminator_hinge(real.float(), fake.float())

    ours = _rehearse([*model.parameters(), *discriminator.parameters(), *_frozen(metric)], forward, keeps_gradients)
    if losses.adversarial_weight == 0:
        return ours
    theirs = _rehearse(discriminator.parameters(), discriminate, keeps_gradients)
    return ActivationMemory(ours.kept, max(ours.peak, theirs.peak))


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
        loss = forward()
        kept = memory.alive
        torch.autograd.backward(loss)
    return ActivationMemory(kept, memory.peak)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
