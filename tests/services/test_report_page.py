"""The report as people see it, in a real browser: whole, quiet, offline, at any width, and its curves answer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ibq_scale.pictures import save_png
from ibq_scale.report.compare import write_report
from tests.services.browser import Page, missing_packages, page

pytestmark = [pytest.mark.slow, pytest.mark.services]
# As a folder may be called; and what else a run may say.
NAMED = "<img src=x onerror=alert(1)>"
HOSTILE = "<img src=x onerror=alert(1)></script><script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers, one with a hostile name and alarm, and a transformer with samples."""
    folder = tmp_path_factory.mktemp("runs")
    for number, (name, task) in enumerate({NAMED: "tokenizer", "plain": "tokenizer", "large": "ar"}.items()):
        run = folder / name
        run.mkdir()
        (run / "config.yaml").write_text(json.dumps({"task": task, "name": name}))
        lines = []
        for step in range(10, 210, 10):
            line = {
                "step": step,
                "samples": 16 * step,
                "time": 0.5 * step,
                "loss": 2 + math.exp(-step / 50) * (number + 1),
            }
            line |= {"usage": 0.9, "l1": 0.2, "psnr": 20.0, "samples_per_s": 30.0, "step_s": 0.5}
            lines.append(line | ({"alarms": [HOSTILE]} if step == 100 else {}))
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        picture = torch.randint(
            0, 256, (3, 66, 530), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
        )
        save_png(run / "images" / f"{'samples' if task == 'ar' else 'reconstructions'}-00000200.png", picture)
    write_report([folder / NAMED, folder / "plain", folder / "large"], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if missing_packages():
        pytest.skip(f"no browser: apt-get install --no-install-recommends {' '.join(missing_packages())}")
    with page(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_whole_and_readable(report: Path, browser: Page, width: int, dark: bool) -> None:
    browser.faults.clear()
    browser.requested.clear()
    browser.open(report, width=width, dark=dark)
    assert browser.faults == []
    assert [url for url in browser.requested if not url.startswith("data:")] == [report.as_uri()]
    pictures = browser.run("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert len(pictures) == 3
    assert all(pictures)
    assert browser.run("document.querySelectorAll('figure.chart svg').length") >= 3
    # Nothing sticks out: what is wider than a phone scrolls within itself.
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("Math.min(...[...document.querySelectorAll('p, td, th')].map(e => e.offsetHeight))") > 0
    assert _contrast(browser) > 7
    assert (_brightness(browser, "backgroundColor") < 0.2) == dark


def _brightness(browser: Page, what: str) -> float:
    """Relative luminance (WCAG) of a colour of the page's body."""
    text = browser.run(f"getComputedStyle(document.body).{what}")
    channels = [int(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(browser: Page) -> float:
    pair = sorted((_brightness(browser, "color"), _brightness(browser, "backgroundColor")))
    return (pair[1] + 0.05) / (pair[0] + 0.05)


def test_what_runs_are_called_is_text(report: Path, browser: Page) -> None:
    browser.open(report, width=1280)
    assert browser.run("document.title") != "taken"
    assert browser.run("document.querySelectorAll('img[src=x]').length") == 0
    said = browser.run("document.body.textContent")
    assert HOSTILE in said
    assert NAMED in said


def test_curves_tell_their_values_and_runs_can_be_hidden(report: Path, browser: Page) -> None:
    browser.open(report, width=1280)
    chart = "document.querySelector('figure.chart')"
    browser.run(f"{chart}.scrollIntoView()")
    x, y = browser.run(
        f"(() => {{ const b = {chart}.querySelector('.plot').getBoundingClientRect();"
        "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    browser.move(x, y)
    tip = browser.run(f"(() => {{ const t = {chart}.querySelector('.tip'); return t.hidden ? '' : t.textContent; }})()")
    assert "100 steps" in tip or "110 steps" in tip
    assert "plain" in tip
    lines = f"{chart}.querySelectorAll('svg polyline').length"
    before = browser.run(lines)
    browser.run(f"{chart}.querySelector('.legend button').click()")
    assert browser.run(lines) == before - 1
    browser.run(f"{chart}.querySelector('.legend button').click()")
    assert browser.run(lines) == before
    browser.run("[...document.querySelectorAll('#axis button')].find(b => b.textContent === 'images').click()")
    browser.move(x + 1, y)
    assert "images" in browser.run(f"{chart}.querySelector('.tip').textContent")
    assert browser.faults == []
