"""Each convention's figures are those of its suite, with one extractor in both. Photographs come from scikit-image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg

from ibq_scale.cli.main import main
from ibq_scale.distributed.environment import join
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.evaluate import generation, reference
from ibq_scale.evaluate.conventions import (
    CONVENTIONS,
    PUBLISHED,
    ConventionResult,
    chosen,
    pillow_bicubic,
    tensorflow_bilinear,
)
from ibq_scale.evaluate.generation import evaluate_generation, load_results
from ibq_scale.evaluate.reference import write_reference
from tests.docs.pages import ROOT
from tests.evaluate.stand_in import QuickInception

# More than the stand-in's features: the suites' square roots differ for singular covariances.
COUNT, SIDE = 72, 48
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with join() as world:
        yield world


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Crops of a photograph, and the same with noise, as PNG files."""
    from skimage import data

    whole, random = data.astronaut(), np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("real", "fake"):
        (folder / name).mkdir()
    for i in range(COUNT):
        top, left = random.integers(0, 512 - SIDE, 2)
        crop = whole[top : top + SIDE, left : left + SIDE]
        noisy = (random.uniform(0.3, 1.7) * crop + random.normal(0, 30, crop.shape)).clip(0, 255).astype(np.uint8)
        for name, pixels in (("real", crop), ("fake", noisy)):
            Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name / f"{i:03d}.png")
    return folder / "real", folder / "fake"


@pytest.fixture(scope="module")
def ours(photographs: tuple[Path, Path], world: World) -> dict[str, ConventionResult]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (generation, reference):
            patch.setattr(module, "Inception", QuickInception)
        real, fake = photographs
        report = evaluate_generation(str(fake), str(real), world, batch=24, conventions="all")
    assert (report.fid, report.recall) == (report.conventions[0].fid, report.conventions[0].recall)
    return {row.convention: row for row in report.conventions}


def _pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.slow
def test_torch_fidelitys_own_calculation(photographs: tuple[Path, Path], ours: dict[str, ConventionResult]) -> None:
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

    class Quick(FeatureExtractorBase):
        def __init__(self, name: str, features: list[str], **unused: Any) -> None:
            super().__init__(name, features)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            resized = resize(images.float(), size=(299, 299), align_corners=False)
            seen = QuickInception(CPU)((resized - 128) / 128)
            values = {"2048": seen.features_BF.double(), "logits_unbiased": seen.logits_BC.double()}
            return tuple(values[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "2048", "logits_unbiased"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits_unbiased" if metric == "isc" else "2048"

    torch_fidelity.register_feature_extractor("quick", Quick)
    options: dict[str, Any] = {"cuda": False, "verbose": False, "cache": False, "save_cpu_ram": True, "batch_size": 24}
    real, fake = photographs
    theirs = torch_fidelity.calculate_metrics(
        input1=str(fake), input2=str(real), fid=True, isc=True, prc=True, feature_extractor="quick", **options
    )
    row = ours["torch-fidelity"]
    assert row.fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert row.inception_score == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert row.inception_score_std == pytest.approx(theirs["inception_score_std"], rel=1e-6)
    assert row.precision == pytest.approx(theirs["precision"], rel=1e-6)
    assert row.recall == pytest.approx(theirs["recall"], rel=1e-6)
    assert 0 < theirs["precision"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("clean-fid", "clean"), ("pytorch-fid", "legacy_pytorch")])
def test_clean_fids_own_calculation(
    photographs: tuple[Path, Path], ours: dict[str, ConventionResult], name: str, mode: str
) -> None:
    """Its resize, its statistics and its distance. The normalization is that of its extractors."""
    pytest.importorskip("cleanfid", reason="clean-fid is not installed: pip install --no-deps clean-fid")
    from cleanfid.fid import fid_from_feats, get_folder_features

    def extract(pixels: torch.Tensor) -> torch.Tensor:
        inputs = (pixels - 128) / 128 if mode == "clean" else 2 * (pixels / 255) - 1
        return QuickInception(CPU)(inputs).features_BF.double()

    features = [
        get_folder_features(str(folder), extract, num_workers=0, batch_size=24, device=CPU, mode=mode, verbose=False)
        for folder in photographs
    ]
    assert ours[name].fid == pytest.approx(fid_from_feats(*features), rel=1e-6)


def test_clean_fids_pixels() -> None:
    pytest.importorskip("cleanfid", reason="clean-fid is not installed: pip install --no-deps clean-fid")
    from cleanfid.resize import build_resizer

    picture = np.random.default_rng(3).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    found = pillow_bicubic(torch.from_numpy(picture).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, (build_resizer("clean")(picture) - np.float32(128)) / np.float32(128))


@pytest.mark.slow
def test_adms_figures_are_its_formulas(photographs: tuple[Path, Path], ours: dict[str, ConventionResult]) -> None:
    """Distances with matrix square roots, and the score of one part of fewer than 5,000 images in order."""
    pictures = [torch.from_numpy(_pictures(folder)).permute(0, 3, 1, 2) for folder in photographs]
    real, fake = (QuickInception(CPU)(tensorflow_bilinear(images)) for images in pictures)

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        (mu, sigma), (nu, tau) = (
            (x.double().numpy().mean(0), np.cov(x.double().numpy(), rowvar=False)) for x in (a, b)
        )
        return float((mu - nu) @ (mu - nu) + np.trace(sigma + tau - 2 * linalg.sqrtm(sigma @ tau).real))

    p = fake.logits_BC.double().softmax(1)
    score = float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp())
    row = ours["adm"]
    assert row.fid == pytest.approx(distance(real.features_BF, fake.features_BF), rel=1e-6)
    assert row.sfid == pytest.approx(distance(real.spatial_BS, fake.spatial_BS), rel=1e-6)
    assert row.inception_score == pytest.approx(score, rel=1e-6)
    assert (row.fid, row.precision) == (ours["torch-fidelity"].fid, ours["torch-fidelity"].precision)
    assert row.inception_score != ours["torch-fidelity"].inception_score


@pytest.mark.slow
def test_rows_are_stamped_and_a_file_holds_all_statistics(
    photographs: tuple[Path, Path],
    ours: dict[str, ConventionResult],
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (generation, reference):
        monkeypatch.setattr(module, "Inception", QuickInception)
    real, fake = map(str, photographs)
    whole, plain = tmp_path / "all.npz", tmp_path / "plain.npz"
    stamp = write_reference(real, whole, None, world, batch=24, conventions="all")
    assert write_reference(real, plain, None, world, batch=24).hash == stamp.hash
    from_file = evaluate_generation(fake, str(whole), world, batch=24, conventions="all")
    assert [row.fid for row in from_file.conventions] == [row.fid for row in ours.values()]
    assert from_file.conventions[1].sfid == ours["adm"].sfid
    assert len({row.fid for row in ours.values()}) == 3
    row = ours["clean-fid"]
    assert (row.images, row.reference_images, row.reference) == (COUNT, COUNT, real)
    assert (row.resize, row.extractor) == (CONVENTIONS["clean-fid"].resize, CONVENTIONS["clean-fid"].extractor)
    assert row.quantisation == "8-bit pictures, none after the resize, clipped to 0 … 255"
    less = evaluate_generation(fake, str(plain), world, batch=24, conventions="adm,clean-fid", to=tmp_path)
    assert (less.fid, less.conventions[0].sfid, less.conventions[1].fid) == (ours["adm"].fid, None, None)
    assert "evaluate reference --conventions clean-fid" in less.conventions[1].not_measured["fid"]
    with pytest.raises(UserError, match="does not serve --conventions clean-fid"):
        evaluate_generation(fake, str(plain), world, batch=24, conventions="clean-fid")
    evaluate_generation(fake, str(plain), world, batch=24, to=tmp_path / "other")
    with pytest.raises(UserError, match="figures by adm and torch-fidelity: they do not compare"):
        load_results([tmp_path / "generation.json", tmp_path / "other" / "generation.json"])


def test_the_table_is_printed_and_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "conventions", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed["conventions"]] == list(CONVENTIONS)
    assert main(["evaluate", "conventions"]) == 0
    lines = capsys.readouterr().out
    page = (ROOT / "docs/evaluation.md").read_text()
    for convention in CONVENTIONS.values():
        assert f"| `{convention.name}` | {convention.suite} | {convention.resize} | {convention.quantisation} |" in page
        assert convention.resize in lines
    for p in PUBLISHED:
        assert f"| {p.figure} | {p.convention or 'not told'} | {p.reference} | {p.source} |" in page
        assert not p.convention or p.convention.split(",")[0] in CONVENTIONS
    with pytest.raises(UserError, match="no convention 'inception': --conventions takes all, or torch-fidelity, adm"):
        chosen("adm,inception")
