"""Samples and references in all their layouts: the same figures; what does not fit is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibq_scale.cli.main import main
from ibq_scale.distributed.environment import join
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.evaluate import generation, reference
from ibq_scale.evaluate.fid import Inception
from ibq_scale.evaluate.generation import GenerationReport, evaluate_generation, load_results
from ibq_scale.evaluate.images import open_images
from ibq_scale.evaluate.reference import write_reference
from tests.evaluate.stand_in import QuickInception

Evaluate = Callable[..., GenerationReport]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with join() as world:
        yield world


@pytest.fixture
def evaluate(world: World, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    for module in (generation, reference):
        monkeypatch.setattr(module, "Inception", QuickInception)
    return lambda samples, real, **options: evaluate_generation(str(samples), str(real), world, batch=8, **options)


def _pixels(count: int, seed: int, side: int = 32) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(side // 4, axis=1).repeat(side // 4, axis=2)


def _png_folder(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return folder


def _figures(report: GenerationReport) -> tuple[float | None, ...]:
    return report.fid, report.inception_score, report.inception_score_std, report.precision, report.recall


def test_a_folder_and_npz_files_are_the_same_images(evaluate: Evaluate, tmp_path: Path) -> None:
    pixels, real = _pixels(21, 0), _pixels(30, 1)
    np.savez(tmp_path / "plain.npz", pixels)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=pixels, arr_1=np.zeros(21))
    (tmp_path / "sampled").mkdir()
    np.savez(tmp_path / "sampled" / "samples.npz", pixels)
    np.savez(tmp_path / "real.npz", real)
    sources = [_png_folder(tmp_path / "png", pixels), *(tmp_path / n for n in ("plain.npz", "packed.npz", "sampled"))]
    reports = [evaluate(source, tmp_path / "real.npz") for source in sources]
    assert len({_figures(report) for report in reports}) == 1
    assert len({report.reference_hash for report in reports}) == 1
    assert reports[0].images == 21
    assert reports[0].not_measured == {}
    fewer = evaluate(tmp_path / "plain.npz", tmp_path / "real.npz", limit=9)
    assert fewer.images == 9
    assert fewer.inception_score is None
    assert "10 images" in fewer.not_measured["inception_score"]
    three = evaluate(tmp_path / "plain.npz", tmp_path / "real.npz", limit=3)
    assert (three.precision, three.not_measured["recall"]) == (None, "they need more than 3 images on both sides")
    with pytest.raises(UserError, match="a distance needs two"):
        evaluate(tmp_path / "plain.npz", tmp_path / "real.npz", limit=1)


def test_a_result_is_left_that_names_what_was_sampled(evaluate: Evaluate, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", _pixels(12, 0))
    facts = {"model": "/runs/l/model", "settings": {"guidance": 2.0}, "job": "abc", "images": 12}
    (tmp_path / "samples.json").write_text(json.dumps(facts))
    np.savez(tmp_path / "real.npz", _pixels(12, 1))
    report = evaluate(tmp_path, tmp_path / "real.npz", to=tmp_path / "results")
    assert report.sampled == {"model": "/runs/l/model", "settings": {"guidance": 2.0}, "job": "abc"}
    [result] = load_results([tmp_path / "results" / "generation.json"])
    assert (result["fid"], result["sampled"]) == (report.fid, report.sampled)
    assert evaluate(tmp_path / "real.npz", tmp_path / "real.npz").sampled is None


def test_images_come_in_order_and_again(world: World, tmp_path: Path) -> None:
    pixels = _pixels(7, 2)
    np.savez_compressed(tmp_path / "x.npz", pixels)
    images = open_images(str(tmp_path / "x.npz"), None)
    for _ in range(2):
        seen = [part.images_u8[i] for part in images.batches(world, 3) for i in torch.nonzero(part.weights_B)[:, 0]]
        assert (torch.stack(seen).permute(0, 2, 3, 1).numpy() == pixels).all()
    third = World(2, 4, 2, torch.device("cpu"))
    [part] = open_images(str(tmp_path / "x.npz"), None).batches(third, 2)
    assert part.weights_B.tolist() == [1, 1]
    assert (part.images_u8.permute(0, 2, 3, 1).numpy() == pixels[4:6]).all()


def test_a_reference_file_says_what_it_was_computed_from(
    evaluate: Evaluate, world: World, dataset: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", _pixels(12, 0))
    file = tmp_path / "new" / "real.npz"
    stamp = write_reference(dataset, file, (32, 32), world, batch=8, features=7)
    stored, direct = evaluate(tmp_path / "x.npz", file), evaluate(tmp_path / "x.npz", dataset)
    assert stored.reference_stamp == stamp
    assert (stamp.images, stamp.crop, stamp.resolution, stamp.features) == (24, "centre", (32, 32), 7)
    assert stored.reference_hash == stamp.hash
    assert stored.fid == direct.fid
    assert (stored.reference_features, direct.reference_features) == (7, 24)
    assert direct.reference_hash != stored.reference_hash, "of other features, precision and recall do not compare"
    with np.load(file) as arrays:
        assert sorted(arrays) == ["features", "mu", "sigma", "stamp"]
        assert arrays["features"].dtype == np.float32


def test_the_usual_suites_files_are_taken_as_unstamped(evaluate: Evaluate, world: World, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", _pixels(12, 0))
    real = _pixels(20, 1)
    np.savez(tmp_path / "real.npz", real)
    write_reference(str(tmp_path / "real.npz"), tmp_path / "own.npz", None, world, batch=8)
    with np.load(tmp_path / "own.npz") as own:
        moments = {name: own[name] for name in ("mu", "sigma")}
    np.savez(tmp_path / "suite.npz", **moments, arr_0=real)
    np.savez(tmp_path / "moments.npz", **moments)
    stamped, suite, only = (evaluate(tmp_path / "x.npz", tmp_path / f"{n}.npz") for n in ("own", "suite", "moments"))
    assert _figures(suite) == _figures(stamped)
    assert suite.reference_stamp is None
    assert suite.reference_hash.startswith("unstamped:")
    assert suite.reference_hash == only.reference_hash
    assert (only.fid, only.precision, only.recall) == (stamped.fid, None, None)
    assert "neither features nor images" in only.not_measured["recall"]


def test_what_does_not_fit_is_refused(
    evaluate: Evaluate, world: World, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "x.npz", _pixels(12, 0))
    np.savez(tmp_path / "large.npz", _pixels(12, 0, side=64))
    write_reference(dataset, tmp_path / "real.npz", (64, 64), world, batch=8, features=9)
    (tmp_path / "text.npz").write_text("no zip")
    flipped = bytearray((tmp_path / "x.npz").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    np.savez(tmp_path / "floats.npz", np.zeros((3, 8, 8, 3)))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "empty").mkdir()
    mixed = _png_folder(tmp_path / "mixed", _pixels(3, 0))
    Image.new("RGB", (40, 32)).save(mixed / "z.png")
    cases = {
        ("x.npz", "real.npz"): "was computed at 64 x 64, the images are 32 x 32",
        ("x.npz", "large.npz"): "64 x 64 pixels, 32 x 32 are needed",
        ("x.npz", "text.npz"): "is damaged or no .npz",
        ("text.npz", "x.npz"): "holds no images",
        ("flipped.npz", "x.npz"): "flipped.npz is damaged: Bad CRC",
        ("floats.npz", "x.npz"): "not uint8",
        ("x.npz", "narrow.npz"): "are not Inception's",
        ("empty", "x.npz"): "holds no pictures",
        ("absent", "x.npz"): "does not exist",
        ("mixed", "x.npz"): "z.png is 32 x 40 pixels",
        (dataset, "x.npz"): "--resolution",
    }
    for (samples, real), said in cases.items():
        with pytest.raises(UserError, match=said):
            evaluate(tmp_path / samples, tmp_path / real)
    monkeypatch.setattr(QuickInception, "sha256", "f" * 64)
    with pytest.raises(UserError, match="computed with another extractor"):
        evaluate(tmp_path / "large.npz", tmp_path / "real.npz")


def test_results_against_two_references_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {
        "reference": "real.npz",
        "reference_hash": "a" * 64,
        "extractor_sha256": "e" * 64,
        "resolution": [32, 32],
        "fid": 2.5,
        "inception_score": None,
        "precision": 0.5,
        "recall": 0.25,
        "images": 10,
    }
    for name, change in {"a": {}, "b": {"fid": 3.0}, "c": {"reference_hash": "b" * 64}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(base | change))
    (tmp_path / "no.json").write_text("[]")
    a, b, c, no = (str(tmp_path / f"{name}.json") for name in ("a", "b", "c", "no"))
    assert main(["evaluate", "compare", a, b]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [["2.5000", "-"], ["3.0000", "-"]]
    for other, said in {c: "measured against another reference", no: "is no result"}.items():
        assert main(["evaluate", "compare", a, other]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert said in lines[0]


def test_from_the_command_line(
    evaluate: Evaluate,
    world: World,
    dataset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the group that is there: a rank of a launcher's does not make processes."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("ibq_scale.distributed.environment.join", lambda: nullcontext(world))
    np.savez(tmp_path / "x.npz", _pixels(12, 0))
    words = ["evaluate", "generation", str(tmp_path / "x.npz"), "--reference", str(tmp_path / "real.npz")]
    assert main(["evaluate", "reference", dataset, "--to", str(tmp_path / "real.npz")]) == 2
    assert "give its --resolution" in capsys.readouterr().err
    reference_words = ["evaluate", "reference", dataset, "--to", str(tmp_path / "real.npz"), "--resolution", "32"]
    assert main([*reference_words, "--json"]) == 0
    stamp = json.loads(capsys.readouterr().out)
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["reference_hash"] == stamp["hash"]
    assert report["fid"] == pytest.approx(evaluate(tmp_path / "x.npz", tmp_path / "real.npz").fid, rel=1e-6)
    assert main([*words, "--limit", "9"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(lines["gFID"]) > 0
    assert lines["IS"] == "not measured: it needs 10 images"
    assert f"24 images of {dataset}, crop centre, 32 x 32" in lines["reference"]
    assert main([*words, "--conventions", "all"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["adm"].startswith(f"FID {report['fid']:.4f}, IS ")
    assert "evaluate reference --conventions clean-fid" in rows["clean-fid"]
    assert main([*words, "--batch", "0"]) == 2
    assert "--batch must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_networks_layout(
    world: World, inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One extractor's statistics and another's samples do not meet: the weight file's hash tells them apart."""
    monkeypatch.setenv("IBQ_SCALE_WEIGHTS", str(inception_weights))
    np.savez(tmp_path / "x.npz", _pixels(4, 0))
    stamp = write_reference(str(tmp_path / "x.npz"), tmp_path / "real.npz", None, world, batch=4)
    assert stamp.extractor_sha256 == Inception(world.device).sha256
    report = evaluate_generation(str(tmp_path / "x.npz"), str(tmp_path / "real.npz"), world, batch=4)
    assert report.fid == pytest.approx(0.0, abs=1e-3)
    assert (report.precision, report.recall) == (1.0, 1.0)
    with np.load(tmp_path / "real.npz") as file:
        arrays = dict(file)
    arrays["stamp"] = np.array(str(arrays["stamp"]).replace(stamp.extractor_sha256, "0" * 64))
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(UserError, match="another extractor"):
        evaluate_generation(str(tmp_path / "x.npz"), str(tmp_path / "other.npz"), world, batch=4)
