"""The page is one file that needs nothing else, and says what it was given."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ibq_scale.errors import UserError
from ibq_scale.report.compare import write_report
from ibq_scale.report.page import (
    MOST_POINTS,
    Bars,
    Chart,
    Gallery,
    Picture,
    Point,
    Section,
    Series,
    Table,
    Tiles,
    render,
    thin,
)
from ibq_scale.report.runs import load_run


def _page() -> str:
    points = [Point(s, 8 * s, 1.5 * s, 1.0 / s) for s in range(1, 6)]
    blocks = [
        Tiles([("PSNR", "21.3 dB", "</script><script>alert(1)</script>")]),
        Chart("Loss", [Series("a </script>", points, 0), Series("b", points, 1)], "nats", "note"),
        Picture(b"\x89PNG", "caption", 'alt "quoted"'),
        Gallery([("cat", b"\x89PNG")], "by class"),
        Table(["key", "value"], [["lr", "0.1"]], "caption", [["another's"]]),
        Bars("Time", [("train", 3.0), ("sample", 1.5)]),
    ]
    return render("Title & more", "subtitle", [Section("Everything", "text", blocks)])


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = _page()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "@import" not in page
    assert not re.search(r"url\((?!data:)", page)
    # An XML namespace is a name, not an address that is opened.
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= {"http://www.w3.org/2000/svg"}


def test_names_cannot_break_out_of_their_place() -> None:
    class Scripts(HTMLParser):
        count = 0

        def handle_starttag(self, tag: str, attrs: list) -> None:
            self.count += tag == "script"

    parser = Scripts()
    parser.feed(_page())
    assert parser.count == 2, "one of the chart's data, one of the page"


def test_the_charts_data_is_readable_json() -> None:
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', _page(), re.S)[1])
    assert [s["name"] for s in data["series"]] == ["a </script>", "b"]
    assert data["series"][0]["points"][1] == [2, 16, 3.0, 0.5]


def test_thinning_keeps_spikes() -> None:
    points = [Point(s, s, s, 100.0 if s == 7777 else 1.0) for s in range(20_000)]
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 2
    assert max(p[3] for p in kept) == 100.0
    assert [p[0] for p in kept] == sorted(p[0] for p in kept)


def _run(folder: Path, lr: float) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"task: tokenizer\nname: {folder.name}\noptimizer: {{lr: {lr}}}\n")
    lines = [{"step": s, "samples": 8 * s, "time": 1.0 * s, "loss": 1 / s, "usage": 0.5} for s in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    return folder


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [_run(tmp_path / "one", 0.1), _run(tmp_path / "two", 0.2)]
    page = write_report(runs, tmp_path / "report.html").read_text()
    assert "optimizer.lr" in page
    assert len(load_run(runs[0]).points("step")) == 3, "a half-written line is left out"
    series = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1])["series"]
    assert [s["slot"] for s in series] == [0, 1]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        write_report([tmp_path], tmp_path / "x.html")


def test_what_is_no_number_breaks_no_chart() -> None:
    points = [Point(i, 8 * i, 0.1, value) for i, value in enumerate((1.0, float("nan"), float("inf"), 2.0))]
    assert [point[3] for point in thin(points)] == [1.0, 2.0]
    assert thin([Point(0, 0, float("nan"), 1.0)]) == []
