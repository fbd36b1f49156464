"""FLOPs of a training step, counted on tensors without memory. A transformer's also by formula.

Only convolutions and matrix products count, two per multiply-add, and recomputation to save memory does not, as usual
for MFU. The codebook's products are counted by formula, since the quantizer is a custom operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ibq_scale.config.models import AutoencoderConfig, DiscriminatorConfig, QuantizerConfig, TransformerConfig
from ibq_scale.config.run import AnyRun, TokenizerLossConfig, TokenizerRun
from ibq_scale.losses.frozen_vit import FrozenFeatures, backbone_of
from ibq_scale.losses.perceptual import Net, Perceptual
from ibq_scale.models.aligned import Alignment
from ibq_scale.models.autoencoder import Autoencoder
from ibq_scale.models.discriminator import make_discriminator
from ibq_scale.models.initial import Uninitialized
from ibq_scale.models.transformer import Transformer
from ibq_scale.models.vit import ViT
from ibq_scale.quantize.kinds import KINDS
from ibq_scale.scaling.allocations import NormShapes

META = torch.device("meta")

# Products required by the quantizer's step: S once, then S and g Cᵀ, ∂S C and ∂Sᵀ z.
STEP_PRODUCTS = KINDS["ibq"].products
# Products that backends do where whole rows are not at hand: S and p C for the sums, S for q̄, S for π, then S, g Cᵀ,
# ∂S C and ∂Sᵀ z. Triton's kernels know q̄ and π from lists of candidates, but for flat tokens (`triton_backend`).
SHARDED_PRODUCTS, TRITON_PRODUCTS = 8, 6


TOKENIZER_FORMULA = (
    "autoencoder forward and back, discriminator three passes, LPIPS twice forward and once back: convolutions and "
    "products, counted"
)
AR_FORMULA = (
    "3 × (L·(projections 2·T·E·(2E + 2·G·d) + attention 4·T²·E + feed-forward 6·T·E·F) + AdaLN 2·E·(6L + 2)·E + "
    "head 2·T·E·V + embedding 0)"
)


def tokenizer_formula(quantizer: QuantizerConfig) -> str:
    """`TOKENIZER_FORMULA` with the products of tokens and codes of this kind of quantizer."""
    products = KINDS[quantizer.kind].products
    name = f"quantizer ({quantizer.kind})"
    own = f"{name} {products} × 2·T·K·D" if products else f"{name} no products with codes"
    return f"{TOKENIZER_FORMULA}; {own}" + ", region 2·T·K·D" * quantizer.region


# The meta device has no GPU kernels and no compiler.
ANYWHERE = {"attention": "auto", "compile": False}


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules and tensors made inside have shapes and dtypes only."""
    with META, Uninitialized():
        yield


def ar_flops(model: TransformerConfig) -> dict[str, float]:
    """FLOPs of an image's forward and backward pass, by part (`AR_FORMULA`). The backward pass has twice the products.

    L blocks of width E on T tokens, G heads of d for keys and values, SwiGLU of F, V codes. A prefix of given vectors
    adds its length to the blocks' T, and its projection to the embedding. Attention counts in full although half is
    masked, as in PaLM (arXiv 2204.02311, appendix B). AdaLN runs once an image. Other embeddings are lookups without
    products.
    """
    L, T, E = model.depth, model.condition_tokens + model.tokens, model.width
    keys_and_values = 2 * model.kv_groups * model.head_dim
    modulations = 6 * L + 2 if model.conditioning == "adaln" else 0
    forward = {
        "attention projections": 2.0 * L * T * E * (2 * E + keys_and_values),
        "attention": 4.0 * L * T**2 * E,
        "feed-forward": 6.0 * L * T * E * model.ffn_hidden,
        "AdaLN": 2.0 * E * modulations * E,
        "head": 2.0 * model.tokens * E * model.codebook_size,
        "embedding": 2.0 * model.condition_tokens * model.condition_width * E,
    }
    return {part: 3.0 * flops for part, flops in forward.items()}


@cache
def ar_executed(model: TransformerConfig) -> float:
    """Executed FLOPs per image of a step, counted, with recomputation by checkpointing.

    Counted for one and for two blocks and extrapolated, since all blocks are equal.
    """
    one, two = (_counted(model.model_copy(update={"depth": depth})) for depth in (1, 2))
    return one + (model.depth - 1) * (two - one)


def _counted(config: TransformerConfig) -> float:
    with on_meta():
        model = Transformer(config.model_copy(update=ANYWHERE))
        codes_BT, labels_B = torch.zeros((1, config.tokens), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return count(lambda: model(codes_BT, labels_B))


@dataclass(frozen=True)
class StepFlops:
    """FLOPs per image of a tokenizer's step. `quantizer_executed`: with the backend's recomputation."""

    autoencoder: float
    quantizer: float
    quantizer_executed: float
    discriminator: float
    perceptual: float
    features: float

    @property
    def total(self) -> float:
        """Required FLOPs of the step, with the discriminator's."""
        return self.autoencoder + self.quantizer + self.discriminator + self.perceptual + self.features


def step_flops(run: TokenizerRun, *, backend: str, sharded: bool) -> StepFlops:
    """Counts a tokenizer's step. `backend`: the quantizer's. `sharded`: ranks share the codebook."""
    model, net = run.model.architecture(), run.loss.perceptual
    needed, executed = _quantizer(run, backend, sharded)
    judges = run.loss.adversarial_weight > 0
    return StepFlops(
        autoencoder=_autoencoder(model, run.quantizer.dim),
        quantizer=needed,
        quantizer_executed=executed,
        discriminator=_discriminator(run.discriminator, model.resolution) if judges else 0.0,
        perceptual=_perceptual(net, model.resolution) if net != "none" else 0.0,
        features=_features(run.loss, model),
    )


def training_flops(run: AnyRun) -> float:
    """Required FLOPs per image of a training step of either stage, for MFU. Counting a tokenizer takes seconds."""
    if isinstance(run, TokenizerRun):
        return step_flops(run, backend="triton", sharded=False).total
    return sum(ar_flops(run.model).values())


def count(call: Callable[[], Tensor]) -> float:
    """FLOPs of computing a tensor and of its backward pass."""
    with NormShapes(), FlopCounterMode(display=False) as counter:
        torch.autograd.backward(call().sum())
    return float(counter.get_total_flops())


def _image(resolution: int) -> Tensor:
    return torch.empty(1, 3, resolution, resolution, device=META)


@cache
def _autoencoder(config: AutoencoderConfig, dim: int) -> float:
    with on_meta():
        model = Autoencoder(config, dim)
    return count(lambda: model.decode(model.encode(_image(config.resolution))))


@cache
def _discriminator(config: DiscriminatorConfig, resolution: int) -> float:
    """Three passes: real and fake for its own weights, and one for the generator, back to the image."""
    model = discriminator_on_meta(config, torch.float32)
    own = count(lambda: model(_image(resolution)))
    model.requires_grad_(False)
    fake = _image(resolution).requires_grad_()
    return 2 * own + count(lambda: model(fake))


@cache
def _perceptual(net: Net, resolution: int) -> float:
    """Both images forward, and back to the reconstruction only."""
    metric = perceptual_on_meta(net, torch.float32)
    fake = _image(resolution).requires_grad_()
    return count(lambda: metric(_image(resolution), fake))


@cache
def _features(losses: TokenizerLossConfig, model: AutoencoderConfig) -> float:
    """The frozen encoder forward, and the projection forward and back."""
    target = features_on_meta(losses, model, torch.float32)
    if target is None:
        return 0.0
    side = model.resolution // model.downsampling
    with on_meta():
        alignment = Alignment(middle := nn.Identity(), model, target.width)
        tap = torch.empty(1, model.channels * model.channel_multipliers[-1], side, side, requires_grad=True)
    middle(tap)
    return count(lambda: alignment(target(_image(model.resolution))))


@cache
def backbone_on_meta(config: DiscriminatorConfig, dtype: torch.dtype) -> ViT | None:
    """The discriminator's frozen backbone on the meta device, which needs no file."""
    with on_meta():
        return backbone_of(config, META, dtype)


def discriminator_on_meta(config: DiscriminatorConfig, dtype: torch.dtype) -> nn.Module:
    """The discriminator on the meta device, with a backbone of the same dtype."""
    with on_meta():
        return make_discriminator(config, backbone_on_meta(config, dtype)).to(dtype)


@cache
def features_on_meta(
    losses: TokenizerLossConfig, model: AutoencoderConfig, dtype: torch.dtype
) -> FrozenFeatures | None:
    """The feature loss's target on the meta device, which needs no file."""
    with on_meta():
        return FrozenFeatures.of(losses, model, META, dtype)


@cache
def perceptual_on_meta(net: Net, dtype: torch.dtype) -> Perceptual:
    """LPIPS on the meta device. The random network is the same VGG and needs no file."""
    with on_meta():
        return Perceptual("random" if net == "vgg" else net, META, dtype)


def _quantizer(run: TokenizerRun, backend: str, sharded: bool) -> tuple[float, float]:
    """Required and executed FLOPs per image."""
    settings = run.quantizer
    tokens = run.model.tokens
    product = 2.0 * tokens * settings.codebook_size * settings.dim
    kind = KINDS[settings.kind]
    # Region VQ's sources have two tokens or more: two products of at most half of the tokens.
    region = product * settings.region
    if not kind.reaches_all_codes:
        return kind.products * product + region, kind.products * product + region
    done = TRITON_PRODUCTS if backend == "triton" else SHARDED_PRODUCTS if sharded else STEP_PRODUCTS
    return kind.products * product + region, done * product + region
