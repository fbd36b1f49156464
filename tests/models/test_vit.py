"""The frozen ViT: DINO's forward pass, its names and shapes, and images of other sides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ibq_scale.losses.frozen_vit import frozen_vit
from ibq_scale.models.vit import MEAN, STD, ViT, ViTSizes

CPU = torch.device("cpu")


def _tiny(layer_scale: bool) -> ViT:
    torch.set_default_dtype(torch.float64)
    try:
        vit = ViT(ViTSizes(patch=4, width=8, depth=3, heads=2, side=12, layer_scale=layer_scale))
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    return vit


def _reference(state: dict[str, Tensor], image_3HW: Tensor, blocks: int) -> Tensor:
    """Tokens (1 + T, W) of one image, token by token and head by head."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        return (
            centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]
            + state[f"{name}.bias"]
        )

    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    pixels = ((image_3HW + 1) / 2 - mean) / std
    kernel_WN = state["patch_embed.proj.weight"].flatten(1)
    side = state["patch_embed.proj.weight"].shape[-1]
    rows = [
        kernel_WN @ pixels[:, i : i + side, j : j + side].flatten() + state["patch_embed.proj.bias"]
        for i in range(0, pixels.shape[1], side)
        for j in range(0, pixels.shape[2], side)
    ]
    x = torch.stack([state["cls_token"][0, 0], *rows]) + state["pos_embed"][0]
    for b in range(blocks):
        q, k, v = linear(f"blocks.{b}.attn.qkv", norm(f"blocks.{b}.norm1", x)).chunk(3, dim=-1)
        heads = []
        for q_h, k_h, v_h in zip(q.chunk(2, -1), k.chunk(2, -1), v.chunk(2, -1), strict=True):
            heads.append((q_h @ k_h.T / q_h.shape[1] ** 0.5).softmax(dim=-1) @ v_h)
        x = x + state.get(f"blocks.{b}.ls1.gamma", 1.0) * linear(f"blocks.{b}.attn.proj", torch.cat(heads, dim=-1))
        h = linear(f"blocks.{b}.mlp.fc1", norm(f"blocks.{b}.norm2", x))
        h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
        x = x + state.get(f"blocks.{b}.ls2.gamma", 1.0) * linear(f"blocks.{b}.mlp.fc2", h)
    return x


@pytest.mark.parametrize("layer_scale", [False, True])
def test_features_are_those_of_a_reference_in_float64(layer_scale: bool) -> None:
    vit = _tiny(layer_scale)
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    state = vit.state_dict()
    with torch.no_grad():
        found = vit(images, (0, 2))
        features = vit.patch_features(images)
    assert len(found) == 3
    for tokens, blocks in zip(found, (0, 1, 3), strict=True):
        expected = torch.stack([_reference(state, image, blocks) for image in images])
        torch.testing.assert_close(tokens, expected)
    normed = torch.nn.functional.layer_norm(found[-1], (8,), state["norm.weight"], state["norm.bias"], 1e-6)
    torch.testing.assert_close(features, normed[:, 1:])


def test_images_of_other_sides_get_interpolated_positions() -> None:
    vit = frozen_vit("dino", "tiny", CPU, torch.float32)
    with torch.no_grad():
        grid = torch.arange(4.0).view(1, 4, 1).expand(1, 4, 32)
        vit.pos_embed[:, 1:] = grid
        positions = vit._positions(3, 5)[0, 1:, 0].view(3, 5)
    # Rows of the 2 × 2 grid differ by 2, columns by 1.
    assert bool((positions.diff(dim=0) > 0).all())
    assert bool((positions.diff(dim=1) > 0).all())
    assert vit(torch.zeros(1, 3, 48, 80), (3,))[-1].shape == (1, 1 + 3 * 5, 32)


def test_random_weights_are_the_same_every_time_and_compute_in_bf16() -> None:
    state = torch.random.get_rng_state()
    first, second = (frozen_vit("dinov2", "tiny", CPU, torch.bfloat16) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    images = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    exact = frozen_vit("dinov2", "tiny", CPU, torch.float32).patch_features(images)
    found = first.patch_features(images)
    assert found.dtype == torch.bfloat16
    assert float(torch.nn.functional.cosine_similarity(found.float(), exact, dim=-1).min()) > 0.99
