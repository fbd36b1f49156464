"""Config of the networks: autoencoder, quantizer, discriminator, transformer. Defaults are the published sizes."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ibq_scale.config.base import Section

PositiveInt = Annotated[int, Field(ge=1)]
# No model has more, and what goes beyond would be built for minutes before it fails.
Layers = Annotated[int, Field(ge=1, le=1024)]
Side = Annotated[int, Field(ge=1, le=2**17)]
Rows = Annotated[int, Field(ge=1, le=2**31)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class AutoencoderConfig(Section):
    """The VQGAN encoder and decoder (128M parameters at the defaults).

    `activation_checkpointing` computes each block again in the backward pass instead of keeping its activations.
    `compile` gives each block to torch.compile in training: for GPUs; on CPUs it brings nothing (docs/benchmarks.md).
    Neither changes what the network is.
    """

    channels: Side = 128
    channel_multipliers: Annotated[tuple[Side, ...], Field(min_length=1, max_length=16)] = (1, 1, 2, 2, 4)
    res_blocks: Layers = 4
    attention_resolutions: tuple[Side, ...] = (16,)
    resolution: Side = 256
    z_channels: Side = 256
    dropout: Probability = 0.0
    activation_checkpointing: bool = False
    compile: bool = False

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    @property
    def tokens(self) -> int:
        """Codes of an image at `resolution`."""
        return (self.resolution // self.downsampling) ** 2

    def architecture(self) -> AutoencoderConfig:
        """The same network without a word on how it is computed: what an exported model says of itself."""
        return self.model_copy(update={"activation_checkpointing": False, "compile": False})

    @model_validator(mode="after")
    def _sizes_fit(self) -> AutoencoderConfig:
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution {self.resolution} is no multiple of the downsampling {self.downsampling} "
                f"({len(self.channel_multipliers)} channel_multipliers)"
            )
        widths = [self.channels * m for m in self.channel_multipliers]
        if any(w % 32 for w in widths):
            raise ValueError(f"every level's width must be a multiple of 32 (GroupNorm), got {widths}")
        return self


class QuantizerConfig(Section):
    """The quantizer between encoder and decoder.

    `kind`: ``ibq`` (index backpropagation, arXiv 2412.02692), ``vq`` (VQGAN: nearest code, straight-through),
    ``simvq`` (frozen basis × one linear layer, arXiv 2411.02038), ``lfq`` (sign bits, arXiv 2310.05737; then
    codebook_size = 2^dim) or ``fsq`` (rounded numbers, arXiv 2309.15505).
    `levels`: FSQ only: values that each of the dim numbers has; codebook_size is their product.
    `beta_on`: the term of the quantization loss that `beta` multiplies: ``codebook`` is what the published
    models were trained with (mean‖C[i*] − sg(z)‖²), ``commitment`` is the paper's text.
    `straight_through`, `double_quantization`: the paper's ablations. Without the first, the decoder's gradient ends at
    the selected codes; without the second, the loss lacks mean‖z_q − z‖².
    `entropy_scope`: ``global`` takes the batch entropy over the whole global batch, so that neither ranks nor
    accumulation change the objective (accumulating costs one more pass of the encoder); ``local`` over each rank's
    micro-batch (what the published code does).
    `backend`: ``auto`` is Triton on a CUDA device that can hold its tiles, cuBLAS products with elementwise Triton
    kernels on other CUDA devices, and plain torch elsewhere.
    `logit_precision`: of the products in training on a CUDA device (sums and softmaxes are fp32 always; CPUs compute
    products in fp32 always). Triton takes codes and the entropy loss from fp64 scores, whatever it is; plain torch on a
    GPU takes tf32 for bf16. `search`: of the coarse product of `encode` and of VQ; the answer is exact either way.
    `tile_bytes`: memory budget of one tile of logits in plain torch, forward and backward; null chooses by device.
    `revive_after`: VQ only: steps after which an unused code is replaced by a token of the batch; 0 is never.
    """

    kind: Literal["ibq", "vq", "simvq", "lfq", "fsq"] = "ibq"
    codebook_size: Rows = 16384
    dim: Side = 256
    beta: NonNegativeFloat = 0.25
    beta_on: Literal["codebook", "commitment"] = "codebook"
    straight_through: bool = True
    double_quantization: bool = True
    entropy_temperature: Annotated[float, Field(gt=0)] = 0.01
    sample_entropy_weight: NonNegativeFloat = 1.0
    batch_entropy_weight: NonNegativeFloat = 1.0
    entropy_scope: Literal["global", "local"] = "global"
    backend: Literal["auto", "tiled", "triton", "cublas"] = "auto"
    logit_precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    search: Literal["fp32", "bf16"] = "bf16"
    tile_bytes: PositiveInt | None = None
    revive_after: Annotated[int, Field(ge=0)] = 0
    levels: Annotated[tuple[Annotated[int, Field(ge=2, le=2**16)], ...], Field(max_length=64)] = ()

    @model_validator(mode="after")
    def _levels_fit(self) -> QuantizerConfig:
        if (self.kind == "fsq") != bool(self.levels):
            raise ValueError("levels are for kind=fsq, which needs them: for example levels=[8,5,5,5]")
        if self.levels and (self.dim, self.codebook_size) != (len(self.levels), math.prod(self.levels)):
            raise ValueError(
                f"levels {list(self.levels)} make dim={len(self.levels)} and codebook_size={math.prod(self.levels)}, "
                f"got {self.dim} and {self.codebook_size}"
            )
        return self

    @model_validator(mode="after")
    def _kind_fits(self) -> QuantizerConfig:
        if self.kind == "lfq" and (self.dim > 31 or self.codebook_size != 2**self.dim):
            raise ValueError(
                f"lfq has one code a pattern of bits: codebook_size must be 2^dim = {2 ** min(self.dim, 31)}, "
                f"got {self.codebook_size}"
            )
        if self.revive_after and self.kind != "vq":
            raise ValueError(f"revive_after is for kind=vq, whose unused codes stay where they are; got {self.kind}")
        return self


class DiscriminatorConfig(Section):
    """PatchGAN discriminator."""

    channels: Side = 64
    layers: Annotated[int, Field(ge=1, le=16)] = 3


AttentionKind = Literal[
    "auto", "flash4", "flash3", "flash2", "sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math"
]


class TransformerConfig(Section):
    """Class-conditional Llama-like transformer over `tokens` codes in raster order.

    `conditioning`: ``adaln`` gives the class to every block as modulations of its norms and residuals, beside the
    prefix token (the published models); ``prefix`` leaves it to the prefix token alone (LlamaGen, arXiv 2406.06525).
    `adaln_gain_init` scales the initial residual gains: 1e-3 for the published B and L, 1e-4 for XL, 1e-5 for XXL.
    `kv_heads`: heads of keys and values, each read by heads / kv_heads of queries; null is as many as `heads`.
    `qk_norm`: RMSNorm over each head's query and key, before they are rotated.
    `attention`: ``auto`` is flash-attn 3, 4 or 2 where installed and possible, else ``sdpa``, which is torch's choice;
    ``sdpa_…`` is one of torch's kernels.
    `activation_checkpointing`: in training, ``full`` computes each block again in the backward pass; ``selective``
    keeps what its matrix products and attention gave, and computes only the rest again. ``auto`` takes the first of
    ``none``, ``selective`` and ``full`` that gives the shortest step (see `scaling.auto`).
    `compile` gives each block to torch.compile in training.
    `fp8`: the blocks' linear layers multiply in fp8 in training (torchao; GPUs of compute capability 8.9 or more); the
    weights stay in bf16 and fp32.
    The last four change nothing of what the network is.
    """

    codebook_size: Rows = 16384
    classes: Rows = 1000
    tokens: Rows = 256
    depth: Layers = 16
    heads: Side = 16
    kv_heads: Side | None = None
    width: Side = 1024
    conditioning: Literal["adaln", "prefix"] = "adaln"
    qk_norm: bool = False
    token_dropout: Probability = 0.1
    residual_dropout: Probability = 0.1
    ffn_dropout: Probability = 0.1
    label_dropout: Probability = 0.1
    adaln_gain_init: Annotated[float, Field(gt=0)] = 1e-3
    attention: AttentionKind = "auto"
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "none"
    compile: bool = False
    fp8: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def kv_groups(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def grid(self) -> int:
        """Side of the square of codes."""
        return int(self.tokens**0.5)

    @property
    def ffn_hidden(self) -> int:
        """SwiGLU's width: 2/3 · 4 · width, rounded up to a multiple of 256."""
        return -(-int(2 * 4 * self.width / 3) // 256) * 256

    def architecture(self) -> TransformerConfig:
        """The same network without a word on how it is computed: what an exported model says of itself."""
        free = {"attention": "auto", "activation_checkpointing": "none", "compile": False, "fp8": False}
        return self.model_copy(update=free)

    @model_validator(mode="after")
    def _sizes_fit(self) -> TransformerConfig:
        if self.width % self.heads or self.head_dim % 4:
            raise ValueError(f"width {self.width} / heads {self.heads} must be a multiple of 4 (2D rotary pairs)")
        if self.heads % self.kv_groups:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.grid**2 != self.tokens:
            raise ValueError(f"tokens must be a square (a grid of codes), got {self.tokens}")
        return self
