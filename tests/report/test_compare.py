"""Reports show what evaluations and samplings left for each run, beside what was published."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from ibq_scale.errors import UserError
from ibq_scale.pictures import save_png
from ibq_scale.report.compare import write_report
from ibq_scale.report.results import MOST_PIXELS, results_of, small
from ibq_scale.report.runs import load_run

MEASURED = {"resolution": 64, "pixels": "8bit", "data": "s3://val", "images": 500, "codebook_size": 1024}
MEASURED |= {"rfid": 12.345, "lpips": None, "psnr": 21.5, "ssim": 0.61234, "usage": 0.987}
GENERATED = {"reference": "ref.npz", "reference_hash": "r1", "reference_stamp": None, "extractor_sha256": "e"}
GENERATED |= {"resolution": [64, 64], "fid": 33.333, "inception_score": 12.25, "precision": 0.5, "recall": None}
GENERATED |= {"images": 5000}
SETTINGS = {"guidance": 2.5, "temperature": 1.1}


class _Tables(HTMLParser):
    """Cells of every table, row by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._inside = tag in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.tables[-1][-1][-1] += data


def _run(path: Path, task: str, **last: float) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(f"task: {task}\nname: {path.name}\n")
    lines = [{"step": s, "samples": 8 * s, "time": 1.0 * s, "loss": 1 / s} for s in (1, 2)]
    lines[0] |= last
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _leave(folder: Path, name: str, facts: dict[str, Any], picture: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(facts))
    save_png(folder / picture, torch.full((3, 4, 4), 9, dtype=torch.uint8))


def _model(run: Path, step: int) -> str:
    return str(run / "checkpoints" / f"step-{step:08d}" / "model")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A tokenizer with a result inside, two transformers, the first with samples inside, the other with them beside."""
    tokenizer = _run(tmp_path / "tok", "tokenizer", validation_psnr=20.25)
    one, two = (_run(tmp_path / name, "ar", validation_loss=5.5) for name in ("one", "two"))
    _leave(tokenizer / "val", "reconstruction.json", MEASURED | {"model": _model(tokenizer, 3000)}, "worst.png")
    for run, folder in ((one, one / "samples"), (two, tmp_path / "samples-of-two")):
        facts = {"model": _model(run, 200), "settings": SETTINGS, "job": "j"}
        _leave(folder, "samples.json", facts, "grid.png")
        _leave(folder, "generation.json", GENERATED | {"sampled": facts}, "grid.png")
    save_png(one / "images" / "samples-00000002.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    return [tokenizer, one, two]


def test_results_stand_beside_the_published_figures(runs: list[Path], tmp_path: Path) -> None:
    page = write_report(runs, tmp_path / "report.html").read_text()
    tables = {table[0][0] + " " + table[0][-1]: table for table in _Tables(page).tables}
    rows = {row[0]: row for row in tables["run data"][1:]}
    ours = ["tok", "3,000", "1,024", "12.35", "–", "21.50", "0.6123", "98.7 %", "500", "64 × 64", "8bit", "s3://val"]
    assert rows["tok"] == ours
    published = [row[2:5] + row[7:8] for row in tables["run data"] if row[0] == "IBQ, published"]
    assert published[3] == ["262,144", "1.00", "0.2030", "84 %"]
    assert rows["VQGAN, published"][:5] == ["VQGAN, published", "–", "16,384", "4.98", "–"]
    rows = {row[0]: row for row in tables["run images"][1:]}
    assert rows["one"] == ["one", "200", "2.50", "1.10", "33.33", "12.2", "0.500", "–", "5,000"]
    assert rows["two"] == ["two", *rows["one"][1:]]
    assert rows["IBQ-XXL, published"][2:6] == ["2.85", "1.20", "2.05", "286.7"]
    assert "arXiv 2412.02692: ImageNet" in page
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    for said in (
        "tok, its worst images",
        "one, samples of step 200",
        "two, samples of step 200",
        "one, step 2: samples in training",
    ):
        assert any(caption.startswith(said) for caption in captions), said


def test_other_references_have_a_table_of_their_own(runs: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "samples-of-two" / "generation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reference_hash": "r2"}))
    tables = _Tables(write_report(runs, tmp_path / "report.html").read_text()).tables
    of_generation = [[row[0] for row in table] for table in tables if "gFID" in table[0]]
    assert [("one" in names, "two" in names) for names in of_generation] == [(True, False), (False, True)]


def test_runs_of_different_kinds_share_no_chart(runs: list[Path], tmp_path: Path) -> None:
    page = write_report(runs, tmp_path / "report.html").read_text()
    charts = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)]
    named = [[(s["name"], s["slot"]) for s in chart["series"]] for chart in charts]
    assert [("tok", 0)] in named
    assert [("one", 1), ("two", 2)] in named
    assert not any({"tok", "one"} <= {name for name, _ in names} for names in named)
    standing = [table for table in _Tables(page).tables if "step" in table[0] and "time" in table[0]]
    assert standing[0][1] == ["tok", "2", "0.0 min", "0.5", "20.25"]
    assert standing[1][2] == ["two", "2", "0.0 min", "0.5", "5.5"]


def test_a_result_belongs_to_the_run_of_its_model(runs: list[Path], tmp_path: Path) -> None:
    (runs[0] / "generation.json").write_text('{"fid": 1.0}')
    (runs[0] / "val" / "generation.json").write_text("{")
    found = {run.name: len(results_of(load_run(run), "generation.json")) for run in runs}
    assert found == {"tok": 0, "one": 1, "two": 1}
    Path(_model(runs[1], 200)).mkdir(parents=True)
    moved = runs[0].rename(tmp_path / "moved")
    # Its model is nowhere any more, so it is that of the run that it lies in.
    assert [r.step for r in results_of(load_run(moved), "reconstruction.json")] == ["3,000"]
    (tmp_path / "one" / "samples").rename(moved / "samples")
    assert results_of(load_run(moved), "generation.json") == []


def test_large_pictures_are_embedded_smaller(tmp_path: Path) -> None:
    save_png(tmp_path / "grid.png", torch.randint(256, (3, 40, 2 * MOST_PIXELS), dtype=torch.uint8))
    content = small(tmp_path / "grid.png")
    assert int.from_bytes(content[16:20], "big") == MOST_PIXELS
    assert len(content) < (tmp_path / "grid.png").stat().st_size / 2


def test_a_run_that_cannot_be_read_is_told_and_left_out(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs[1] / "config.yaml").write_text("")
    page = write_report(runs, tmp_path / "report.html").read_text()
    assert "2 runs" in page
    said = capsys.readouterr().err
    assert said.startswith("ibq-scale: left out: ")
    assert "config.yaml is damaged" in said
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        write_report([runs[1]], tmp_path / "report.html")
