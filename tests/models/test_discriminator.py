"""Heads on a frozen DINO: what is trained, spectral norms, and DiffAugment."""

from __future__ import annotations

import torch

from ibq_scale.config.models import DiscriminatorConfig
from ibq_scale.losses.frozen_vit import backbone_of
from ibq_scale.models.augment import KINDS, augment
from ibq_scale.models.discriminator import DinoDiscriminator, SpectralConv, iterate_spectral_norms
from ibq_scale.models.vit import ViT

SMALL = DiscriminatorConfig(kind="dino", backbone="tiny", input_side=48)


def _make(**changes: object) -> tuple[DinoDiscriminator, ViT]:
    config = SMALL.model_copy(update=changes)
    backbone = backbone_of(config, torch.device("cpu"), torch.float32)
    assert backbone is not None
    torch.manual_seed(0)
    return DinoDiscriminator(config, backbone), backbone


def _images(batch: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_only_the_heads_are_trained_and_the_gradient_reaches_the_images() -> None:
    discriminator, backbone = _make()
    images = _images().requires_grad_()
    logits = discriminator(images)
    assert logits.shape == (3, 5, 9)
    torch.autograd.backward(logits.square().sum())
    assert images.grad is not None
    assert all(bool(grad.any()) for grad in images.grad)
    assert all(p.grad is not None and bool(p.grad.any()) for p in discriminator.parameters())
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    assert all(name.startswith("heads.") for name in discriminator.state_dict())


def test_an_images_logits_do_not_depend_on_its_micro_batch() -> None:
    discriminator, _ = _make()
    discriminator.eval()
    images = _images()
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(discriminator(images), alone)


def test_a_spectral_norm_moves_by_steps_and_not_by_forward_passes() -> None:
    torch.manual_seed(0)
    conv = SpectralConv(6, 4, 3)
    x = torch.randn(2, 6, 8)
    before = conv(x)
    assert torch.equal(conv(x), before)
    for _ in range(200):
        iterate_spectral_norms(conv)
    with torch.no_grad():
        largest = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
        expected = torch.nn.functional.conv1d(
            torch.nn.functional.pad(x, (1, 1), mode="circular"), conv.weight / largest, conv.bias
        )
    torch.testing.assert_close(conv(x), expected)


def test_augmentation_has_its_seed_and_the_right_gradient() -> None:
    images = _images(1, 4).double().requires_grad_()

    def changed(x: torch.Tensor, kinds: tuple[str, ...] = tuple(KINDS)) -> torch.Tensor:
        torch.manual_seed(3)
        return augment(x, kinds)

    assert torch.equal(changed(images), changed(images))
    assert torch.equal(augment(images, ()), images)
    assert not torch.equal(augment(images, ("color",)), changed(images, ("color",)))
    assert torch.autograd.gradcheck(changed, images)


def test_a_translation_moves_by_an_eighth_at_the_most_and_a_cutout_is_a_square() -> None:
    torch.manual_seed(0)
    images = 1.0 + torch.arange(16.0 * 16).view(1, 1, 16, 16).expand(200, 3, -1, -1)
    seen = set()
    for image, moved in zip(images, augment(images, ("translation",)), strict=True):
        # Where pixel (8, 8) has gone tells the shift.
        (place,) = (moved[0] == image[0, 8, 8]).nonzero()
        down, right = (int(p) - 8 for p in place)
        seen.add((down, right))
        expected = torch.zeros(20, 20)
        expected[2 + down : 18 + down, 2 + right : 18 + right] = image[0]
        assert torch.equal(moved, expected[2:18, 2:18].expand(3, -1, -1))
    assert seen == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    areas = set()
    for left in augment(torch.ones(200, 3, 16, 16), ("cutout",))[:, 0]:
        rows, columns = (int((left == 0).any(dim=dim).sum()) for dim in (1, 0))
        assert int((left == 0).sum()) == rows * columns
        areas.add((rows, columns))
    assert max(areas) == (8, 8)
    assert min(min(area) for area in areas) == 4
