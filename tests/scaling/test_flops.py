"""FLOP counts against counts by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ibq_scale.config.layers import resolve
from ibq_scale.config.run import TokenizerRun
from ibq_scale.models.autoencoder import AttentionBlock, ResnetBlock
from ibq_scale.scaling.flops import META, count, step_flops

# VGG16 to its 13th convolution: widths at each side of the picture, halved in between.
VGG = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512))


def _run(*overrides: str) -> TokenizerRun:
    run = resolve("tokenizer/tiny", ["loss.perceptual=random", *overrides]).config
    assert isinstance(run, TokenizerRun)
    return run


def _convolution(side: int, inputs: int, outputs: int, kernel: int) -> float:
    return 2.0 * side**2 * inputs * outputs * kernel**2


def test_a_residual_block() -> None:
    with META:
        block = ResnetBlock(32, 64, 0.0)
        x = torch.empty(2, 32, 16, 16, requires_grad=True)
    forward = _convolution(16, 32, 64, 3) + _convolution(16, 64, 64, 3) + _convolution(16, 32, 64, 1)
    assert count(lambda: block(x)) == 2 * 3 * forward


def test_an_attention_block() -> None:
    with META:
        block = AttentionBlock(64)
        x = torch.empty(1, 64, 8, 8, requires_grad=True)
    forward = 4 * _convolution(8, 64, 64, 1) + 2 * 2.0 * 64 * 64 * 64
    assert count(lambda: block(x)) == 3 * forward


@pytest.mark.slow
def test_perceptual_loss_is_two_passes_forward_and_one_back() -> None:
    forward = 0.0
    for level, widths in enumerate(VGG):
        side = 64 // 2**level
        forward += sum(_convolution(side, a, b, 3) for a, b in pairwise(widths))
        forward += _convolution(side, widths[-1], 1, 1) / 2  # the layer above, on the difference of both pictures
    assert step_flops(_run(), backend="tiled", sharded=False).perceptual == pytest.approx(3 * forward, rel=1e-3)


@pytest.mark.slow
def test_the_discriminator_is_three_passes_and_the_codebook_five_products() -> None:
    run = _run()
    flops = step_flops(run, backend="tiled", sharded=False)
    first = _convolution(32, 3, 16, 4)
    rest = _convolution(16, 16, 32, 4) + _convolution(15, 32, 64, 4) + _convolution(14, 64, 1, 4)
    # Real and fake: no gradient at the picture. For the generator: none at the weights.
    assert flops.discriminator == 2 * (2 * first + 3 * rest) + 2 * (first + rest)
    product = 2.0 * 256 * 1024 * 64
    assert flops.quantizer == flops.quantizer_executed == 5 * product
    assert step_flops(run, backend="triton", sharded=True).quantizer_executed == 6 * product
    assert flops.total == flops.autoencoder + flops.quantizer + flops.discriminator + flops.perceptual


@pytest.mark.slow
def test_a_frozen_dino_has_no_gradient_at_its_weights_and_the_feature_loss_none_at_its_target() -> None:
    tiny = (
        "discriminator.kind=dino",
        "discriminator.backbone=tiny",
        "discriminator.input_side=32",
        "loss.features=tiny",
    )
    found = step_flops(_run("loss.perceptual=none", *tiny), backend="tiled", sharded=False)

    def vit(patch: int, patches: int) -> tuple[float, float]:
        """Products with weights, and of queries, keys and values: four blocks of width 32."""
        tokens = patches + 1
        weights = 2.0 * patches * 3 * patch**2 * 32 + 4 * 2.0 * tokens * 32 * 32 * (3 + 1 + 4 + 4)
        return weights, 4 * 2 * 2.0 * tokens**2 * 32

    (linear, mixed), first = vit(16, 4), 5 * 2.0 * 4 * 32 * 32
    rest = 5 * 2.0 * 4 * (9 * 32 * 32 + 32)
    own = linear + mixed + 2 * first + 3 * rest
    assert found.discriminator == 2 * own + 2 * linear + 3 * mixed + 2 * (first + rest)
    # 16 × 16 tokens, the decoder's width 64.
    assert found.features == sum(vit(14, 256)) + 3 * 2.0 * 256 * (64 * 256 + 256 * 256 + 256 * 32)


@pytest.mark.slow
def test_what_is_off_counts_nothing_and_what_saves_memory_counts_once() -> None:
    flops = step_flops(_run(), backend="tiled", sharded=False)
    lean = _run("loss.perceptual=none", "loss.adversarial_weight=0", "model.activation_checkpointing=true")
    without = step_flops(lean, backend="tiled", sharded=False)
    assert (without.perceptual, without.discriminator) == (0.0, 0.0)
    assert without.autoencoder == flops.autoencoder
    assert step_flops(_run("quantizer.kind=vq"), backend="tiled", sharded=False).quantizer == flops.quantizer / 5
    region = _run("quantizer.kind=vq", "quantizer.region=true")
    assert step_flops(region, backend="tiled", sharded=False).quantizer == flops.quantizer * 2 / 5
