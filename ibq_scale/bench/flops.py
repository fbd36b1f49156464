"""Floating-point operations of a tokenizer's training step, counted on tensors without memory.

Convolutions and matrix products only, two a multiplication with its addition, as MFU is usually counted; work that is
done again to save memory does not count. The codebook's products are counted by formula, since the quantizer is an
operator of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ibq_scale.bench.quantizer import STEP_PRODUCTS
from ibq_scale.config.run import TokenizerRun
from ibq_scale.losses.perceptual import Perceptual
from ibq_scale.models.autoencoder import Autoencoder
from ibq_scale.models.discriminator import PatchDiscriminator

META = torch.device("meta")
# Products that backends do where whole rows are not at hand: S and p C for the sums, S for q̄, S for π, then S, g Cᵀ,
# ∂S C and ∂Sᵀ z together or, in Triton, S and g Cᵀ for each of the two.
SHARDED_PRODUCTS, TRITON_PRODUCTS = 8, 10


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one image's share of a training step. `quantizer_executed` counts what the backend does again, too."""

    autoencoder: float
    quantizer: float
    quantizer_executed: float
    discriminator: float
    perceptual: float

    @property
    def total(self) -> float:
        """What the step needs, the discriminator's turn included."""
        return self.autoencoder + self.quantizer + self.discriminator + self.perceptual


def step_flops(run: TokenizerRun, *, backend: str, sharded: bool) -> StepFlops:
    """Counts a step of this config. `backend` is the quantizer's, `sharded` whether ranks share the codebook."""
    side = run.model.resolution
    image = torch.empty(1, 3, side, side, device=META)
    needed, executed = _quantizer(run, backend, sharded)
    return StepFlops(
        autoencoder=_autoencoder(run, image),
        quantizer=needed,
        quantizer_executed=executed,
        discriminator=_discriminator(run, image) if run.loss.adversarial_weight > 0 else 0.0,
        perceptual=_perceptual(run, image) if run.loss.perceptual != "none" else 0.0,
    )


def count(call: Callable[[], Tensor]) -> float:
    """FLOPs of computing a tensor and going back from it."""
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(call().sum())
    return float(counter.get_total_flops())


def _autoencoder(run: TokenizerRun, image: Tensor) -> float:
    with META:
        model = Autoencoder(run.model.architecture(), run.quantizer.dim)
    return count(lambda: model.decode(model.encode(image)))


def _discriminator(run: TokenizerRun, image: Tensor) -> float:
    """Three passes: real and fake for its own weights, and once for the generator, back to the picture."""
    with META:
        model = PatchDiscriminator(run.discriminator)
    own = count(lambda: model(image))
    model.requires_grad_(False)
    fake = image.clone().requires_grad_()
    return 2 * own + count(lambda: model(fake))


def _perceptual(run: TokenizerRun, image: Tensor) -> float:
    """Both pictures forward, back to the reconstruction alone."""
    net = run.loss.perceptual
    assert net != "none"
    # The random network is the same VGG, and reads no file.
    metric = Perceptual("random" if net == "vgg" else net, META)
    fake = image.clone().requires_grad_()
    return count(lambda: metric(image, fake))


def _quantizer(run: TokenizerRun, backend: str, sharded: bool) -> tuple[float, float]:
    """FLOPs an image that are needed, and that are done."""
    settings = run.quantizer
    tokens = (run.model.resolution // run.model.downsampling) ** 2
    product = 2.0 * tokens * settings.codebook_size * settings.dim
    if settings.kind == "lfq":
        return 0.0, 0.0
    if settings.kind != "ibq":
        # The search alone. SimVQ's layer makes the codes once a micro-batch, which is little beside it.
        return product, product
    done = TRITON_PRODUCTS if backend == "triton" else SHARDED_PRODUCTS if sharded else STEP_PRODUCTS
    return STEP_PRODUCTS * product, done * product
