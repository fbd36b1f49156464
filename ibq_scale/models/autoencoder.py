"""The VQGAN encoder and decoder (convolutions, GroupNorm, single-head attention), and the tokenizer around them.

Module names are those of the published checkpoints, so an import needs no renaming.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ibq_scale.config.models import AutoencoderConfig, QuantizerConfig
from ibq_scale.models.layout import convolution_layout
from ibq_scale.models.norm import GroupNorm, GroupNormSiLU
from ibq_scale.profiling import part
from ibq_scale.quantize.collectives import WHOLE, Shards
from ibq_scale.quantize.quantized import Quantized
from ibq_scale.quantize.quantizer import batch_sums, quantize

# torch.compile's limit of graphs per code object: blocks × widths × resolutions, with and without gradient.
COMPILED_GRAPHS = 64


def _norm_silu(channels: int) -> GroupNorm:
    return GroupNormSiLU(32, channels, eps=1e-6)


def _conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResnetBlock(nn.Module):
    """norm → SiLU → conv, twice, with a 1×1 shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm_silu(inputs)
        self.conv1 = _conv3(inputs, outputs)
        self.norm2 = _norm_silu(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3(outputs, outputs)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.dropout(self.norm2(h)))
        out: Tensor = self.nin_shortcut(x) + h
        return out


class AttentionBlock(nn.Module):
    """Self-attention over all positions, one head of the full width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(32, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        n = self.norm(x)
        q, k, v = (conv(n).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj_out(out.squeeze(1).transpose(1, 2).reshape(b, c, h, w))
        return x + projected


class Downsample(nn.Module):
    """Halves the sides: one column and row of zeros at right and bottom, then a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles the sides by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _run(block: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    """The block's output. With `checkpointing` its activations are recomputed in the backward pass."""
    if not (checkpointing and torch.is_grad_enabled()):
        out: Tensor = block(x)
        return out
    again: Tensor = checkpoint(block, x, use_reentrant=False)
    return again


class Level(nn.Module):
    """The blocks of one resolution and the step to the next. `attn` is empty in a level without attention."""

    def __init__(self, config: AutoencoderConfig, level: int, inputs: int, blocks: int) -> None:
        super().__init__()
        outputs = config.channels * config.channel_multipliers[level]
        attention = config.resolution // 2**level in config.attention_resolutions
        widths = [inputs] + [outputs] * (blocks - 1)
        self.block = nn.ModuleList(ResnetBlock(width, outputs, config.dropout) for width in widths)
        self.attn = nn.ModuleList(AttentionBlock(outputs) for _ in range(blocks if attention else 0))
        self.checkpointing = config.activation_checkpointing
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = _run(block, x, self.checkpointing)
            if len(self.attn):
                x = _run(self.attn[i], x, self.checkpointing)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, config.dropout)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, config.dropout)
        self.checkpointing = config.activation_checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block_1, self.attn_1, self.block_2):
            x = _run(block, x, self.checkpointing)
        return x


class Encoder(nn.Module):
    """(B, 3, H, W) → (B, z_channels, H/f, W/f)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = _conv3(3, config.channels)
        self.down = nn.ModuleList()
        inputs = config.channels
        for i, width in enumerate(widths):
            level = Level(config, i, inputs, config.res_blocks)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            inputs = width
        self.mid = Middle(inputs, config)
        self.norm_out = _norm_silu(inputs)
        self.conv_out = _conv3(inputs, config.z_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.conv_in(x_BCHW)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(self.norm_out(self.mid(h)))
        return out


class Decoder(nn.Module):
    """(B, z_channels, h, w) → (B, 3, f·h, f·w), with one block per level more than the encoder."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        inputs = widths[-1]
        self.conv_in = _conv3(config.z_channels, inputs)
        self.mid = Middle(inputs, config)
        levels: list[nn.Module] = []
        for i in reversed(range(len(widths))):
            level = Level(config, i, inputs, config.res_blocks + 1)
            if i > 0:
                level.upsample = Upsample(widths[i])
            levels.append(level)
            inputs = widths[i]
        # Numbered by resolution as in the encoder: up.0 is the largest and runs last.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm_silu(inputs)
        self.conv_out = _conv3(inputs, 3)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        out: Tensor = self.conv_out(self.norm_out(h))
        return out


class Autoencoder(nn.Module):
    """Encoder and decoder with the 1×1 convolutions to and from the code's width D."""

    def __init__(self, config: AutoencoderConfig, code_dim: int) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, config.z_channels, 1)

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] (B, 3, H, W) → z (B, D, H/f, W/f) in the parameters' dtype."""
        z: Tensor = self.quant_conv(self.encoder(convolution_layout(x_BCHW, self.quant_conv.weight.dtype)))
        return z

    def decode(self, z_BDhw: Tensor) -> Tensor:
        """Codes' vectors (B, D, h, w) → images (B, 3, f·h, f·w), about [-1, 1], not clamped."""
        z_BDhw = convolution_layout(z_BDhw, self.quant_conv.weight.dtype)
        x: Tensor = self.decoder(self.post_quant_conv(z_BDhw))
        return x

    def compile_regions(self, sizes: int = 1) -> None:
        """Compiles every residual and attention block with torch.compile, in place. Parameters keep their names.

        `sizes`: number of different image sizes.

        Blocks of equal sizes share a graph. Each input size has its own graphs, and so has a pass without gradient.
        """
        import torch._dynamo

        most = sizes * COMPILED_GRAPHS
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, most)
        for module in self.modules():
            if isinstance(module, ResnetBlock | AttentionBlock):
                module.compile(fullgraph=True, dynamic=False)


class TokenizerModel(nn.Module):
    """The module of a training engine: the autoencoder. The codebook is an argument, outside every engine."""

    def __init__(self, model: AutoencoderConfig, quantizer: QuantizerConfig) -> None:
        super().__init__()
        self.autoencoder = Autoencoder(model, quantizer.dim)
        self.settings = quantizer

    def forward(
        self,
        x_BCHW: Tensor,
        rows_KD: Tensor,
        shards: Shards = WHOLE,
        mean_K: Tensor | None = None,
        age_K: Tensor | None = None,
    ) -> tuple[Tensor, Quantized]:
        """Images (B, 3, H, W) and this rank's rows of the codebook → (reconstruction, `Quantized` of B·h·w tokens).

        `mean_K`: mean softmax over all micro-batches of a step, from `batch_sums`, for the batch entropy.
        `age_K`: the window of `quantizer.region`, updated in place.
        If the encoder's output is not finite, the reconstruction and its gradients are NaN. The codebook's other ranks
        continue, and the engine skips the step on all ranks together.
        """
        with part("encoder"):
            z_BDhw = self.autoencoder.encode(x_BCHW)
            finite = z_BDhw.detach().isfinite().all()
        with part("quantizer"):
            quantized = self.quantize(torch.where(finite, z_BDhw, 0.0), rows_KD, shards, mean_K, age_K)
        with part("decoder"):
            reconstruction = self.autoencoder.decode(image_of(quantized.z_q_ND, z_BDhw.shape))
        return reconstruction * torch.where(finite, 1.0, torch.nan), quantized

    def quantize(
        self, z_BDhw: Tensor, rows_KD: Tensor, shards: Shards, mean_K: Tensor | None, age_K: Tensor | None
    ) -> Quantized:
        """The encoder's output (B, D, h, w) → `Quantized` of its B·h·w tokens."""
        return quantize(tokens_of(z_BDhw), rows_KD, self.settings, shards, mean_K, age_K)

    @torch.no_grad()
    def batch_sums(self, x_BCHW: Tensor, rows_KD: Tensor, shards: Shards = WHOLE) -> tuple[Tensor, Tensor]:
        """`quantizer.batch_sums` of the encoded tokens."""
        z_BDhw = self.autoencoder.encode(x_BCHW)
        z_BDhw = torch.where(z_BDhw.isfinite().all(), z_BDhw, 0.0)
        return batch_sums(tokens_of(z_BDhw), rows_KD, self.settings, shards)


def frozen_parameters(network: Autoencoder, parts: Collection[str]) -> list[nn.Parameter]:
    """Parameters of `encoder` and `decoder`, if named in `parts`, with their 1×1 convolutions."""
    part_of = {"encoder": "encoder", "quant_conv": "encoder", "decoder": "decoder", "post_quant_conv": "decoder"}
    return [p for name, p in network.named_parameters() if part_of[name.partition(".")[0]] in parts]


def tokens_of(z_BDhw: Tensor) -> Tensor:
    """(B, D, h, w) → (B·h·w, D), raster order."""
    return z_BDhw.permute(0, 2, 3, 1).reshape(-1, z_BDhw.shape[1])


def image_of(z_ND: Tensor, shape_BDhw: torch.Size) -> Tensor:
    """The inverse of `tokens_of` for a map of this shape."""
    b, d, h, w = shape_BDhw
    return z_ND.view(b, h, w, d).permute(0, 3, 1, 2)
