"""The autoencoder: the same numbers however it is computed; precision and layout inside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ibq_scale.config.models import AutoencoderConfig, DiscriminatorConfig
from ibq_scale.models import layout
from ibq_scale.models.autoencoder import AttentionBlock, Autoencoder, ResnetBlock
from ibq_scale.models.discriminator import PatchDiscriminator

SMALL = AutoencoderConfig(
    channels=32, channel_multipliers=(1, 1), res_blocks=2, resolution=16, attention_resolutions=(8,), z_channels=8
)


def _make(**changes: object) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(SMALL.model_copy(update=changes), code_dim=8)


def _images(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _step(model: Autoencoder, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients; dropout draws from the same seed."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = (model.decode(model.encode(images)).float() - images).square().mean()
    torch.autograd.backward(loss)
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_bit(dropout: float) -> None:
    loss, grads = _step(_make(dropout=dropout), _images())
    again = _make(dropout=dropout, activation_checkpointing=True)
    runs = []
    for module in again.modules():
        if isinstance(module, ResnetBlock | AttentionBlock):
            module.register_forward_pre_hook(lambda *_: runs.append(1))
    checkpointed_loss, checkpointed_grads = _step(again, _images())
    regions = sum(isinstance(m, ResnetBlock | AttentionBlock) for m in again.modules())
    assert len(runs) == 2 * regions, "every block runs once more in the backward pass"
    assert torch.equal(checkpointed_loss, loss)
    assert all(torch.equal(checkpointed_grads[name], grads[name]) for name in grads)


def _bytes_kept(model: Autoencoder) -> int:
    """What a forward pass keeps for the backward pass beside the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.decode(model.encode(_images()))
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_keeps_few_bytes_for_the_backward_pass(dtype: torch.dtype) -> None:
    kept = [_bytes_kept(_make(activation_checkpointing=on).to(dtype)) for on in (False, True)]
    assert kept[1] < 0.4 * kept[0]


def test_bf16_keeps_about_half_of_fp32s_bytes() -> None:
    """Statistics in fp32 do not mean that activations are kept in fp32."""
    assert _bytes_kept(_make().bfloat16()) < 0.6 * _bytes_kept(_make())


def test_an_architecture_says_nothing_of_how_it_is_computed() -> None:
    changed = SMALL.model_copy(update={"activation_checkpointing": True, "compile": True})
    assert changed.architecture() == SMALL


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_regional_compilation_keeps_names_and_numbers_and_shares_graphs(checkpointing: bool) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    loss, grads = _step(_make(), _images())
    model = _make(activation_checkpointing=checkpointing)
    names = list(model.state_dict())
    model.compile_regions()
    compiled_loss, compiled_grads = _step(model, _images())
    assert list(model.state_dict()) == names
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-6)
    for name in grads:
        torch.testing.assert_close(compiled_grads[name], grads[name], rtol=1e-3, atol=1e-5)
    # One a kind of block and resolution: 16² and 8² residual blocks, 8² attention; the 21 blocks share them.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    assert model.decode(model.encode(_images(batch=1))).shape == (1, 3, 16, 16)
    assert counters["stats"]["unique_graphs"] == 6, "another batch size has graphs of its own"


@pytest.mark.slow
def test_bf16_stays_near_fp32() -> None:
    """Weights and activations keep 8 bits: outputs within 5 %, the gradient within 5° of fp32's."""
    images = _images(batch=4)
    model, narrow = _make(), _make().bfloat16()
    with torch.no_grad():
        reference, found = (m.decode(m.encode(images)).float() for m in (model, narrow))
    assert float((found - reference).norm() / reference.norm()) < 0.05
    flat = []
    for m in (model, narrow):
        _, grads = _step(m, images)
        flat.append(torch.cat([g.float().flatten() for g in grads.values()]))
    assert float(nn.functional.cosine_similarity(flat[0], flat[1], dim=0)) > 0.996


def test_channels_last_goes_through_all_networks_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs are given; a layer that lost the order would cost a copy at each convolution after it."""
    expected = _make().decode(_make().encode(_images()))
    monkeypatch.setattr(layout, "order_on", lambda device: torch.channels_last)
    model, discriminator = _make(), PatchDiscriminator(DiscriminatorConfig(channels=16, layers=2))
    lost = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if not x.is_contiguous(memory_format=torch.channels_last):
            lost.append((type(module).__name__, tuple(x.shape)))

    for module in (*model.modules(), *discriminator.modules()):
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(look)
    images = _images().contiguous(memory_format=torch.channels_last)
    z = model.encode(images)
    x = model.decode(z)
    discriminator(x)
    assert not lost
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


def test_cpus_convolve_channels_first() -> None:
    images = _images().contiguous(memory_format=torch.channels_last)
    assert layout.convolution_layout(images, torch.float32).is_contiguous()
