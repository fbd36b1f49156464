"""Published backbones: real names and shapes load, others are refused; the target of the feature loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ibq_scale.cli.main import main
from ibq_scale.errors import UserError
from ibq_scale.losses.frozen_vit import PUBLISHED, FrozenFeatures, frozen_vit, read
from ibq_scale.losses.weights import SOURCES

CPU = torch.device("cpu")


def _published(patch: int, positions: int, scales: bool) -> dict[str, torch.Tensor]:
    """The names and shapes of the files on dl.fbaipublicfiles.com. Expanded numbers make a small file."""
    w = 384
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, w),
        "pos_embed": (1, positions, w),
        "patch_embed.proj.weight": (w, 3, patch, patch),
        "patch_embed.proj.bias": (w,),
    }
    if scales:
        shapes["mask_token"] = (1, w)
    for b in range(12):
        for name, outputs, inputs in (
            ("attn.qkv", 3 * w, w),
            ("attn.proj", w, w),
            ("mlp.fc1", 4 * w, w),
            ("mlp.fc2", w, 4 * w),
        ):
            shapes |= {f"blocks.{b}.{name}.weight": (outputs, inputs), f"blocks.{b}.{name}.bias": (outputs,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{b}.{name}.weight": (w,), f"blocks.{b}.{name}.bias": (w,)}
        for name in ("ls1", "ls2") if scales else ():
            shapes[f"blocks.{b}.{name}.gamma"] = (w,)
    shapes |= {"norm.weight": (w,), "norm.bias": (w,)}
    return {name: torch.full((1,), 0.01 * i).expand(shape) for i, (name, shape) in enumerate(shapes.items())}


def test_a_published_dino_is_fetched_from_a_file_checked_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IBQ_SCALE_WEIGHTS", str(tmp_path / "weights"))
    with pytest.raises(UserError, match=f"{SOURCES['dino'].file} is not in .*fetch-weights dino"):
        frozen_vit("dino", "published", CPU, torch.float32)
    tensors = _published(16, 197, scales=False)
    assert len(tensors) == 150
    given = tmp_path / SOURCES["dino"].file
    torch.save({name: t for name, t in tensors.items() if name != "norm.bias"}, given)
    assert main(["fetch-weights", "dino", "--from", str(given)]) == 2
    assert "is damaged or another network's" in capsys.readouterr().err
    torch.save(tensors, given)
    assert main(["fetch-weights", "dino", "--from", str(given)]) == 0
    state = frozen_vit("dino", "published", CPU, torch.float32).state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_a_published_dinov2_loads_without_the_token_of_its_training(tmp_path: Path) -> None:
    tensors = _published(14, 1370, scales=True)
    assert len(tensors) == 175
    torch.save(tensors, tmp_path / "v2.pth")
    assert read(tmp_path / "v2.pth", PUBLISHED["dinov2"]).keys() == tensors.keys() - {"mask_token"}
    with pytest.raises(UserError, match="is damaged or another network's"):
        read(tmp_path / "v2.pth", PUBLISHED["dino"])
    (tmp_path / "v2.pth").write_bytes(b"text")
    with pytest.raises(UserError, match="is damaged or another network's"):
        read(tmp_path / "v2.pth", PUBLISHED["dinov2"])


def test_the_target_has_one_feature_for_each_token() -> None:
    features = FrozenFeatures("tiny", 16, CPU, torch.float32)
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    target_BWhw = features(images)
    assert target_BWhw.shape == (2, features.width, 3, 3)
    assert features(images[..., :32]).shape == (2, features.width, 3, 2)
    # A change of the right lower corner alone changes that token's feature most.
    images[:, :, 40:, 40:] = 1.0
    moved_Bhw = (features(images) - target_BWhw).norm(dim=1)
    assert bool((moved_Bhw.flatten(1).argmax(dim=1) == 8).all())
