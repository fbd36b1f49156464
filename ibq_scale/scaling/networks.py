"""The networks of a run by part, counted on the meta device from the modules themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from ibq_scale.config.models import AutoencoderConfig, DiscriminatorConfig, TransformerConfig
from ibq_scale.config.run import ARRun, TokenizerRun
from ibq_scale.models.aligned import Alignment
from ibq_scale.models.autoencoder import Autoencoder
from ibq_scale.models.layout import compute_dtype
from ibq_scale.models.muon import newton_schulz_flops
from ibq_scale.models.optimizers import parameter_groups
from ibq_scale.models.transformer import Transformer
from ibq_scale.scaling.flops import (
    backbone_on_meta,
    discriminator_on_meta,
    features_on_meta,
    on_meta,
    perceptual_on_meta,
)


@dataclass(frozen=True)
class Network:
    """Parameters by part, and elements of each parameter by the optimizer's groups. `buffers`: elements.

    `muon_flops`: of Muon's iterations in a step.
    """

    parts: dict[str, int]
    groups: tuple[tuple[int, ...], ...]
    buffers: int
    muon_flops: int = 0

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    @property
    def muon(self) -> bool:
        """Whether Muon steps the first group."""
        return self.muon_flops > 0

    @property
    def moments(self) -> int:
        """Elements of all moments: Adam has two, Muon one."""
        return 2 * self.parameters - (sum(self.groups[0]) if self.muon else 0)


def transformer(run: ARRun) -> Network:
    """Of stage 2."""
    # Settings of the computation change no parameter.
    return _transformer(run.model.architecture(), run.optimizer.kind)


# A search for settings asks for the same networks dozens of times. No optimizer is made: its import takes a second.
@cache
def _transformer(model: TransformerConfig, kind: str) -> Network:
    with on_meta():
        module = Transformer(model)
    groups = parameter_groups(module, kind)
    flops = sum(newton_schulz_flops(*parameter.shape) for parameter in groups[0])
    return _network(module, _transformer_part, [group for group in groups if group], flops)


def autoencoder(run: TokenizerRun) -> Network:
    """What stage 1's first engine trains."""
    target = features_on_meta(run.loss, run.model, compute_dtype(run))
    return _autoencoder(run.model.architecture(), run.quantizer.dim, 0 if target is None else target.width)


@cache
def _autoencoder(model: AutoencoderConfig, dim: int, features: int) -> Network:
    with on_meta():
        module = Autoencoder(model, dim)
        if features:
            module.add_module("alignment", Alignment(module.decoder.mid, model, features))
    return _network(module, _autoencoder_part, [list(module.parameters())])


@cache
def discriminator(config: DiscriminatorConfig) -> Network:
    """The network of stage 1's second engine."""
    module = discriminator_on_meta(config, torch.float32)
    return _network(module, lambda _: "discriminator", [list(module.parameters())])


def frozen(run: TokenizerRun) -> dict[str, int]:
    """Elements of stage 1's frozen networks, by name."""
    net, target = run.loss.perceptual, features_on_meta(run.loss, run.model, compute_dtype(run))
    modules = {
        "LPIPS": None if net == "none" else perceptual_on_meta(net, compute_dtype(run)),
        "DINO": backbone_on_meta(run.discriminator, compute_dtype(run)),
        "DINOv2": None if target is None else target.vit,
    }
    return {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items() if m is not None}


def _network(
    module: nn.Module, part: Callable[[str], str], together: Sequence[list[nn.Parameter]], muon_flops: int = 0
) -> Network:
    parts: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        parts[part(name)] = parts.get(part(name), 0) + parameter.numel()
    groups = tuple(tuple(p.numel() for p in group) for group in together)
    return Network(parts, groups, sum(b.numel() for b in module.buffers()), muon_flops)


def _transformer_part(name: str) -> str:
    if "ada_lin" in name:
        return "AdaLN"
    if name.startswith("head"):
        return "head"
    if name.partition(".")[0].endswith("_emb"):
        return f"{name.partition('_')[0]} embedding".removeprefix("tok ")
    return "feed-forward" if "feed_forward" in name or "ffn" in name else "attention"


def _autoencoder_part(name: str) -> str:
    if name.startswith("alignment"):
        return "feature projection"
    return "encoder" if name.startswith(("encoder", "quant_conv")) else "decoder"
