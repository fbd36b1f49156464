"""Config of the networks: autoencoder, quantizer, discriminator, transformer. Defaults are the published sizes."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ibq_scale.config.base import Section

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
# Upper bounds beyond any model. Without them a mistyped size would build for minutes and then fail.
Layers = Annotated[int, Field(ge=1, le=1024)]
Side = Annotated[int, Field(ge=1, le=2**17)]
Rows = Annotated[int, Field(ge=1, le=2**31)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
# CLIP's first temperature of cosines (arXiv 2103.00020).
DEFAULT_TEMPERATURE = 0.07
Probability = Annotated[float, Field(ge=0, lt=1)]


class AutoencoderConfig(Section):
    """The VQGAN encoder and decoder (128M parameters at the defaults)."""

    channels: Side = Field(128, description="Width of the first level.")
    channel_multipliers: Annotated[tuple[Side, ...], Field(min_length=1, max_length=16)] = Field(
        (1, 1, 2, 2, 4),
        description="Width of each level as a multiple of `channels`. Each level after the first halves the sides.",
    )
    res_blocks: Layers = Field(4, description="Residual blocks in each level of the encoder. The decoder has one more.")
    attention_resolutions: tuple[Side, ...] = Field(
        (16,), description="Levels of these sides have self-attention after each block."
    )
    resolution: Side = Field(256, description="Side of the training images in pixels.")
    z_channels: Side = Field(
        256, description="Channels of the encoder's output, before the 1×1 convolution to `quantizer.dim`."
    )
    dropout: Probability = Field(0.0, description="Dropout in the residual blocks.")
    activation_checkpointing: bool = Field(
        False,
        description="Recompute each block in the backward pass instead of keeping its activations. The results "
        "do not change.",
    )
    compile: bool = Field(
        False,
        description="Compile each block with torch.compile in training. Meant for GPUs: on CPUs it gains "
        "nothing (docs/benchmarks.md).",
    )

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    @property
    def tokens(self) -> int:
        """Codes of an image at `resolution`."""
        return (self.resolution // self.downsampling) ** 2

    def architecture(self) -> AutoencoderConfig:
        """The config without settings of the computation, as an exported model stores it."""
        return self.model_copy(update={"activation_checkpointing": False, "compile": False})

    @model_validator(mode="after")
    def _sizes_fit(self) -> AutoencoderConfig:
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of the downsampling {self.downsampling} "
                f"({len(self.channel_multipliers)} channel_multipliers)"
            )
        widths = [self.channels * m for m in self.channel_multipliers]
        if any(w % 32 for w in widths):
            raise ValueError(f"every level's width must be a multiple of 32 (GroupNorm), got {widths}")
        return self


class QuantizerConfig(Section):
    """The quantizer between encoder and decoder."""

    kind: Literal["ibq", "vq", "simvq", "lfq", "fsq"] = Field(
        "ibq",
        description="`ibq`: index backpropagation (arXiv 2412.02692). `vq`: nearest code, straight-through "
        "(VQGAN). `simvq`: a frozen basis times one linear layer (arXiv 2411.02038). `lfq`: sign bits (arXiv "
        "2310.05737), with codebook_size = 2^dim. `fsq`: rounded numbers (arXiv 2309.15505).",
    )
    codebook_size: Rows = Field(16384, description="Codes K.")
    dim: Side = Field(256, description="Dimensions D of a code.")
    beta: NonNegativeFloat = Field(
        0.25, description="Factor on one term of the quantization loss, chosen by `beta_on`."
    )
    beta_on: Literal["codebook", "commitment"] = Field(
        "codebook",
        description="The term that `beta` multiplies. `codebook`: mean‖C[i*] − sg(z)‖², as the published models "
        "were trained. `commitment`: mean‖sg(C[i*]) − z‖², as the paper writes.",
    )
    straight_through: bool | Literal["dynamic", "rotation"] = Field(
        True,
        description="The decoder's gradient to the encoder. true: as the quantizer defines it. false: none, it ends "
        "at the selected codes (an ablation of the paper). For vq and simvq also `dynamic`: times d*/d, d a token's "
        "squared distance to its code and d* the least of the batch's tokens of that code (arXiv 2609.26774), and "
        "`rotation`: turned and scaled by the map of the token onto its code (arXiv 2410.06424).",
    )
    double_quantization: bool = Field(
        True, description="false: the loss lacks mean‖z_q − z‖² (an ablation of the paper)."
    )
    region: bool = Field(
        False,
        description="Region VQ (StableVQ, arXiv 2609.26774) in place of the codebook's own loss term, with its weight: "
        "codes move to the mean of their tokens, and unused codes to such a mean near them. Not for lfq and fsq.",
    )
    region_window: Annotated[int, Field(ge=1, le=2**40)] = Field(
        65536, description="Tokens of all ranks within which a code counts as used, so that `region` leaves it alone."
    )
    l2_normalize: bool = Field(
        False, description="Tokens and codes have length 1, and the scores are cosines. Not for lfq and fsq."
    )
    temperature: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="IBQ with `l2_normalize`: the scores are cosines over this value. null: 0.07. Softmax over random "
        "codes is then neither flat nor a single code.",
    )
    entropy_temperature: Annotated[float, Field(gt=0)] = Field(
        0.01, description="Temperature τ of the softmax in the entropy loss."
    )
    sample_entropy_weight: NonNegativeFloat = Field(
        1.0, description="Weight of the mean entropy of a token. This term is minimised."
    )
    batch_entropy_weight: NonNegativeFloat = Field(
        1.0, description="Weight of the entropy of the mean distribution. This term is maximised."
    )
    entropy_scope: Literal["global", "local"] = Field(
        "global",
        description="`global`: the batch entropy is taken over the global batch. Ranks and accumulation then do "
        "not change the objective, and accumulation costs one more pass of the encoder. `local`: over each rank's "
        "micro-batch, as in the published code.",
    )
    backend: Literal["auto", "tiled", "triton", "cublas"] = Field(
        "auto",
        description="`auto`: Triton on a CUDA device with room for its tiles, cuBLAS products with elementwise Triton "
        "kernels on other CUDA devices, and plain torch (`tiled`) elsewhere.",
    )
    logit_precision: Literal["fp32", "tf32", "bf16"] = Field(
        "bf16",
        description="Precision of the products in training on a CUDA device. Sums and softmaxes are always "
        "fp32, and so are products on a CPU. Triton takes codes and the entropy loss from fp64 scores at any "
        "setting. Plain torch on a GPU uses tf32 for `bf16`.",
    )
    search: Literal["fp32", "bf16"] = Field(
        "bf16",
        description="Precision of the coarse product in `encode` and in VQ. The chosen codes are exact either way.",
    )
    tile_bytes: PositiveInt | None = Field(
        None, description="Memory of one tile of logits in plain torch, forward and backward. null: chosen by device."
    )
    revive_after: Annotated[int, Field(ge=0)] = Field(
        0, description="VQ only: replace a code by a token of the batch after so many unused steps. 0: never."
    )
    levels: Annotated[tuple[Annotated[int, Field(ge=2, le=2**16)], ...], Field(max_length=64)] = Field(
        (), description="FSQ only: number of values of each dimension. Their product is `codebook_size`."
    )

    @property
    def switches(self) -> str:
        """The settings past the published quantizers, in words."""
        through = self.straight_through if isinstance(self.straight_through, str) else ""
        words = [
            f"{through} straight-through" * bool(through),
            "region" * self.region,
            "unit length" * self.l2_normalize,
        ]
        return ", ".join(filter(None, words))

    @property
    def cosine_temperature(self) -> float:
        """`temperature`, or its default."""
        return DEFAULT_TEMPERATURE if self.temperature is None else self.temperature

    @model_validator(mode="after")
    def _settings_fit(self) -> QuantizerConfig:
        if (self.kind == "fsq") != bool(self.levels):
            raise ValueError("levels are for kind=fsq only, and required there: for example levels=[8,5,5,5]")
        if self.levels and (self.dim, self.codebook_size) != (len(self.levels), math.prod(self.levels)):
            raise ValueError(
                f"levels {list(self.levels)} make dim={len(self.levels)} and codebook_size={math.prod(self.levels)}, "
                f"got {self.dim} and {self.codebook_size}"
            )
        if self.straight_through in ("dynamic", "rotation") and self.kind not in ("vq", "simvq"):
            own = "through softmax(S) to all codes" if self.kind == "ibq" else "through its rounding, number by number"
            raise ValueError(
                f"straight_through={self.straight_through} is for kind=vq and simvq: {self.kind} has a gradient of its "
                f"own, {own}"
            )
        for name in ("region", "l2_normalize"):
            if getattr(self, name) and self.kind in ("lfq", "fsq"):
                raise ValueError(f"{name} is for kind=ibq, vq and simvq: the codes of {self.kind} are fixed")
        if self.temperature is not None and not (self.l2_normalize and self.kind == "ibq"):
            raise ValueError(
                "temperature is for kind=ibq with l2_normalize=true: other scores have no softmax or scale"
            )
        if self.kind == "lfq" and (self.dim > 31 or self.codebook_size != 2**self.dim):
            raise ValueError(
                f"lfq has one code per bit pattern: codebook_size must be 2^dim = {2 ** min(self.dim, 31)}, "
                f"got {self.codebook_size}"
            )
        if self.revive_after and self.kind != "vq":
            raise ValueError(
                f"revive_after is for kind=vq only, since the unused codes of others move: got {self.kind}"
            )
        return self


class DiscriminatorConfig(Section):
    """The discriminator: a PatchGAN, or heads on a frozen DINO."""

    kind: Literal["patch", "dino"] = Field(
        "patch",
        description="`patch`: PatchGAN (the published models). `dino`: a frozen DINO ViT-S/16 with trained heads on "
        "five depths, as in StyleGAN-T and RAE.",
    )
    channels: Side = Field(
        64, description="`patch`: width of the first convolution. It doubles with each layer, up to eightfold."
    )
    layers: Annotated[int, Field(ge=1, le=16)] = Field(3, description="`patch`: convolutions of stride 2.")
    backbone: Literal["published", "random", "tiny"] = Field(
        "published",
        description="`dino`: weights of the backbone. `published`: `ibq-scale fetch-weights dino`. `random`: seeded "
        "random weights of the same sizes, for dry runs. `tiny`: random and of 4 narrow blocks, for tests.",
    )
    input_side: Annotated[int, Field(ge=32, le=4096)] = Field(
        224, description="`dino`: images are resized to this side, a multiple of 16."
    )
    augment: tuple[Literal["color", "translation", "cutout"], ...] = Field(
        ("color", "translation", "cutout"),
        description="`dino`: random changes of real and reconstructed images (DiffAugment, arXiv 2006.10738).",
    )

    @model_validator(mode="after")
    def _side_fits(self) -> DiscriminatorConfig:
        if self.input_side % 16:
            raise ValueError(f"input_side must be a multiple of 16, DINO's patch, got {self.input_side}")
        return self


AttentionKind = Literal[
    "auto", "flash4", "flash3", "flash2", "sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math"
]


class TransformerConfig(Section):
    """Llama-like transformer over `tokens` codes, conditional on a class or on given vectors."""

    codebook_size: Rows = Field(16384, description="Codes to choose from: the tokenizer's codebook size.")
    classes: Rows = Field(1000, description="Number of classes. Label `classes` itself means no class.")
    tokens: Rows = Field(256, description="Codes of an image. Must be a square.")
    depth: Layers = Field(16, description="Blocks.")
    heads: Side = Field(16, description="Heads of queries.")
    kv_heads: Side | None = Field(
        None,
        description="Heads of keys and values, each shared by heads / kv_heads query heads. null: as many as `heads`.",
    )
    width: Side = Field(1024, description="Width of the residual stream.")
    conditioning: Literal["adaln", "prefix", "embedding"] = Field(
        "adaln",
        description="`adaln`: the class modulates norms and residuals of every block and is the prefix token "
        "(the published models). `prefix`: the class is the prefix token only (LlamaGen, arXiv 2406.06525). "
        "`embedding`: the prefix is vectors stored with the codes (`tokenize --captions`), and no class is read.",
    )
    condition_tokens: Annotated[int, Field(ge=0, le=2**12)] = Field(
        0, description="`embedding`: most vectors of a condition, as in the codes' manifest. 0 for others."
    )
    condition_width: Annotated[int, Field(ge=0, le=2**17)] = Field(
        0, description="`embedding`: width of these vectors, as in the codes' manifest. 0 for others."
    )
    order: Literal["raster", "random", "annealed"] = Field(
        "raster",
        description="Order of the codes in training. `random`: a permutation for each sample, and an embedding of each "
        "step's target. `annealed`: the same, with a probability that falls to 0 between `schedule.order_anneal_start` "
        "and `schedule.order_anneal_end` (RAR, arXiv 2411.00776). The embedding fades with it, so the model is a plain "
        "raster model at the end. Validation and samples are in raster order always.",
    )
    qk_norm: bool = Field(False, description="RMSNorm over each head's query and key, before the rotation.")
    token_dropout: Probability = Field(0.1, description="Dropout of the embeddings.")
    residual_dropout: Probability = Field(0.1, description="Dropout of each attention's output.")
    ffn_dropout: Probability = Field(0.1, description="Dropout of each feed-forward layer's output.")
    label_dropout: Probability = Field(
        0.1,
        description="Probability of replacing a label by no class, or a condition by none, in training, for "
        "classifier-free guidance.",
    )
    adaln_gain_init: Annotated[float, Field(gt=0)] = Field(
        1e-3,
        description="Scale of the initial residual gains of AdaLN. Published: 1e-3 for B and L, 1e-4 for XL, "
        "1e-5 for XXL.",
    )
    attention: AttentionKind = Field(
        "auto",
        description="`auto`: flash-attn 3, 4 or 2 where installed and supported, else `sdpa`. `sdpa`: torch's "
        "own choice. `sdpa_…`: that kernel of torch. The results agree up to rounding.",
    )
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        "none",
        description="`full`: recompute each block in the backward pass. `selective`: keep the outputs of matrix "
        "products and attention, and recompute the rest. `auto`: the one with the shortest step that fits the GPU's "
        "memory. The results do not change.",
    )
    compile: bool = Field(False, description="Compile each block with torch.compile in training.")
    fp8: bool = Field(
        False,
        description="The blocks' linear layers multiply in fp8 in training (torchao, GPUs of compute capability "
        "8.9 or more). Weights stay in bf16 and fp32.",
    )

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
        """The config without settings of the computation, as an exported model stores it."""
        free = {"attention": "auto", "activation_checkpointing": "none", "compile": False, "fp8": False}
        return self.model_copy(update=free)

    def stored(self) -> dict[str, object]:
        """`architecture` as JSON of a model on disk, without keys unknown to older programs where they say nothing."""
        of_embedding = set() if self.conditioning == "embedding" else {"condition_tokens", "condition_width"}
        of_order = {"order"} if self.order == "raster" else set()
        return self.architecture().model_dump(mode="json", exclude=of_order | of_embedding)

    def with_order(self, share: float) -> TransformerConfig:
        """The config of the model at this probability of a random order: in raster order at 0 (models/order.py)."""
        return self if share else self.model_copy(update={"order": "raster"})

    @model_validator(mode="after")
    def _sizes_fit(self) -> TransformerConfig:
        if self.width % self.heads or self.head_dim % 4:
            raise ValueError(f"width {self.width} / heads {self.heads} must be a multiple of 4 (2D rotary pairs)")
        if self.heads % self.kv_groups:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.grid**2 != self.tokens:
            raise ValueError(f"tokens must be a square (a grid of codes), got {self.tokens}")
        sizes = (self.condition_tokens, self.condition_width)
        if (self.conditioning == "embedding", self.conditioning == "embedding") != tuple(size > 0 for size in sizes):
            raise ValueError(
                "condition_tokens and condition_width belong to conditioning=embedding, and are the sizes in the "
                f"manifest of its codes: got {sizes[0]} and {sizes[1]} for {self.conditioning}"
            )
        return self
