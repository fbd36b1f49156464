"""LPIPS with local weights: the backbone's numbers arrive, and its absence is said in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ibq_scale.errors import UserError
from ibq_scale.losses.perceptual import BACKBONES, Perceptual


def test_an_absent_backbone_names_file_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_SCALE_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=rf"vgg16-397923af\.pth is not in {tmp_path}"):
        Perceptual("vgg", torch.device("cpu"))


@pytest.mark.parametrize("content", ["text", "cut", "another"])
def test_a_damaged_backbone_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("IBQ_SCALE_WEIGHTS", str(tmp_path))
    file = tmp_path / BACKBONES["alex"]
    torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11)}, file)
    if content != "another":
        file.write_bytes(b"text" if content == "text" else file.read_bytes()[:-500])
    with pytest.raises(UserError, match=f"{file} is damaged or another network's: 'ibq-scale fetch-weights'"):
        Perceptual("alex", torch.device("cpu"))


@pytest.mark.slow
def test_torchvisions_weights_are_those_that_lpips_would_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in backbone in torchvision's layout: the metric must equal the package's own on the same network."""
    import lpips
    import torchvision

    monkeypatch.setenv("IBQ_SCALE_WEIGHTS", str(tmp_path))
    torch.manual_seed(3)
    backbone = torchvision.models.alexnet(weights=None)
    torch.save(backbone.state_dict(), tmp_path / BACKBONES["alex"])
    ours = Perceptual("alex", torch.device("cpu"))
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    own = dict(backbone.features.named_children())
    for part in theirs.net.children():
        for number, layer in part.named_children():
            if isinstance(layer, torch.nn.Conv2d):
                layer.load_state_dict(own[number].state_dict())
    a, b = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(ours(a, b), theirs(a, b).flatten())
    assert torch.equal(ours(a, a), torch.zeros(2))


@pytest.mark.slow
def test_the_random_network_is_the_same_every_time() -> None:
    a, b = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    first, second = (Perceptual("random", torch.device("cpu"))(a, b) for _ in range(2))
    assert torch.equal(first, second)
    assert float(first) > 0


@pytest.mark.slow
def test_a_backbone_in_bf16_stays_near_fp32() -> None:
    """8 bits in 13 convolutions: the distance within 1 %, its gradient within 11° of fp32's, and both in fp32."""
    g = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 32, 32, generator=g) * 2 - 1
    b = a + 0.3 * torch.randn(a.shape, generator=g)
    distances, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        fake = b.clone().requires_grad_()
        distance = Perceptual("random", torch.device("cpu"), dtype)(a, fake)
        assert distance.dtype == torch.float32
        (gradient,) = torch.autograd.grad(distance.sum(), fake)
        distances.append(distance.detach())
        gradients.append(gradient.flatten())
    torch.testing.assert_close(distances[1], distances[0], rtol=0.01, atol=0)
    assert float(torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0)) > 0.98
