"""What a person is told about a data set is what is in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ibq_scale.cli.main import main
from ibq_scale.data.describe import as_text, describe
from ibq_scale.data.sheet import CELL, GAP, save_sheet
from ibq_scale.errors import UserError
from tests.data.layouts import write_tar
from tests.samples import CLASSES


def test_facts(dataset: str, pictures: Path) -> None:
    facts = describe(dataset).facts
    assert (facts["kind"], facts["samples"], facts["classes"], facts["measured"]) == ("images", 24, 3, 24)
    assert facts["labels"] == {"0": 8, "1": 8, "2": 8}
    assert facts["formats"] == {"jpeg": 18, "png": 6}
    assert facts["pictures"]["width"] == {"min": 40, "5%": 40, "median": 54, "95%": 68, "max": 68}
    assert facts["pictures"]["height"]["min"] == facts["pictures"]["height"]["max"] == 48
    assert facts["pictures"]["aspect"]["max"] == pytest.approx(68 / 48, abs=1e-3)
    sizes = [p.stat().st_size for p in pictures.rglob("*.*")]
    assert facts["pictures"]["picture bytes"]["max"] == max(sizes)
    json.dumps(facts)


def test_bars_follow_the_counts_and_many_classes_are_cut_short(pictures: Path, tmp_path: Path) -> None:
    from ibq_scale.data.adopt import adopt_tars

    picture = next(pictures.rglob("*.jpg")).read_bytes()
    # Class i has 1 + i samples, of 31.
    labels = [label for label in range(31) for _ in range(label + 1)]
    write_tar(tmp_path / "a.tar", [(str(i), {"jpg": picture, "cls": str(n).encode()}) for i, n in enumerate(labels)])
    adopt_tars(str(tmp_path))
    lines = as_text(describe(str(tmp_path))).splitlines()
    bars = {line.split()[0]: line.count("█") for line in lines if "█" in line}
    assert list(bars) == [str(label) for label in [*range(30, 20, -1), *range(9, -1, -1)]]
    assert (bars["30"], bars["9"]) == (40, round(40 * 10 / 31))
    assert any("11 classes between" in line for line in lines)


def test_a_sheet_shows_the_same_samples_for_a_seed(dataset: str, tmp_path: Path) -> None:
    chosen = [sample.member.key for sample in describe(dataset, pick=6, seed=1).picked]
    assert len(set(chosen)) == 6
    assert chosen == [sample.member.key for sample in describe(dataset, pick=6, seed=1).picked]
    assert chosen != [sample.member.key for sample in describe(dataset, pick=6, seed=2).picked]
    assert len(describe(dataset, pick=100).picked) == 24
    described = describe(dataset, pick=6, seed=1)
    save_sheet(tmp_path / "new/sheet.png", described.picked, described.classes)
    with Image.open(tmp_path / "new/sheet.png") as sheet:
        pixels = np.asarray(sheet)
    # Three columns of two rows; the first picture stands at the foot of its cell, in its class's colour.
    assert pixels.shape[1] == 3 * (CELL + GAP) + GAP
    first = described.picked[0]
    assert abs(int(pixels[GAP + CELL - 10, GAP + 10, first.member.label]) - 230) < 12
    assert (pixels[: GAP - 1] == 255).all()
    with pytest.raises(UserError, match="cannot write"):
        save_sheet(Path("/dev/null/sheet.png"), described.picked, described.classes)


def test_commands(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", dataset, "--sheet", str(tmp_path / "s.png"), "--images", "4"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in CLASSES)
    assert (tmp_path / "s.png").is_file()
    assert main(["data", "verify", dataset, "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert (verified["samples"], verified["faults"]) == (24, [])
    shutil.copytree(dataset, tmp_path / "foreign")
    for name in [p for p in (tmp_path / "foreign").iterdir() if p.suffix != ".tar"]:
        name.unlink()
    assert main(["data", "index", str(tmp_path / "foreign"), "--where", "width>=60", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["filtered"]) == (9, 15)
    for words in (["stats", dataset, "--images", "0"], ["verify", dataset, "--workers", "0"]):
        assert main(["data", *words]) == 2
        assert "must be at least 1" in capsys.readouterr().err
