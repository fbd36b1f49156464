"""The recipes of docs/extending.md: each is applied to a copy of the package, and its commands run there."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ibq_scale.data.prepare import prepare_images
from tests.docs.pages import ROOT, blocks, sections
from tests.nursery import program, rank_environ
from tests.samples import SMALL_AR, write_codes, write_pictures
from tests.train.runs import SMALL

PAGE = ROOT / "docs/extending.md"
RECIPES = {text.splitlines()[0]: text for text in sections(PAGE)}
NAMES = "Names from outside"
CHANGES = [name for name, text in RECIPES.items() if blocks(text, "diff")]
SIZES = {
    "tokenizer": (*SMALL, "train.global_batch=4"),
    "ar": (*SMALL_AR, "train.global_batch=4", "train.micro_batch=4", "train.log_every=1"),
}
# The package's modules are those of the copy, also in a process that has imported torch and the package already.
RUN = """
import sys
for name in ("ibq_scale.models.fused_norm", "ibq_scale.quantize.function"):
    if module := sys.modules.get(name):
        # torch registers the operators of a name once.
        module.library._destroy()
for name in [name for name in sys.modules if name.partition(".")[0] == "ibq_scale"]:
    del sys.modules[name]
sys.path.insert(0, {copy!r})
from ibq_scale.cli.main import main
assert main.__code__.co_filename.startswith({copy!r})
sys.argv = ["ibq-scale", *{words!r}]
sys.exit(main())
"""


def _matching(pattern: str, lines: list[str], at: int) -> bool:
    """Whether the line is the pattern's, of which `…` is the end of any line."""
    return lines[at].startswith(pattern[:-1]) if pattern.endswith("…") else lines[at] == pattern


def _place(pattern: str, lines: list[str], after: int) -> int:
    (place,) = [at for at in range(after, len(lines)) if _matching(pattern, lines, at)]
    return place


def apply(change: str, root: Path) -> None:
    """Applies a `diff` block of the page. Context and removed lines are each found once in the rest of their file."""
    path, lines, added, at = root, [], [], 0
    for line in [*change.splitlines(), "+++ "]:
        if line.startswith("+++ "):
            assert at or not added, f"{path}: no line says where {added} belongs"
            lines[at:at] = added
            added = []
            if path.is_file():
                path.write_text("\n".join(lines) + "\n")
            path = root / line.removeprefix("+++ ")
            lines, at = path.read_text().splitlines() if path.is_file() else [], 0
        elif line.startswith("+") and added and added[-1].startswith("-"):
            was, now = added.pop()[1:], line[1:]
            lines[at] = now[:-1] + lines[at][len(was) - 1 :] if was.endswith("…") else now
            at += 1
        elif line.startswith("+"):
            added.append(line[1:])
        else:
            at = _place(line[1:], lines, at)
            lines[at:at] = added
            at += len(added)
            added = [line] if line.startswith("-") else []
            at += line.startswith(" ")
    assert path == root / ""


def _written(text: str, root: Path) -> None:
    for block in blocks(text, "python"):
        (root / block.splitlines()[0].removeprefix("# ")).write_text(block)
    for change in blocks(text, "diff"):
        apply(change, root)


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each command, small enough for a test."""
    for line in "".join(blocks(text, "console")).splitlines():
        begin, *words = shlex.split(line.removeprefix("$ "))
        assert begin == "ibq-scale"
        if words[0] == "train":
            longer = [word for word in words if word.startswith("train.steps=")]
            words = [*words[:3], *SIZES[words[1]], "data.workers=0", "train.steps=3", *words[3:], *longer]
        yield words


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package in a folder that is the current one."""
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ibq_scale", tmp_path / "ibq_scale", ignore=skipped)
    for data in ("deepspeed_configs", "slurm"):
        (tmp_path / data).symlink_to(ROOT / data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(name: str, copy: Path) -> None:
    _written(RECIPES[name], copy)
    (environ,) = rank_environ(1)
    for words in _commands(RECIPES[name]):
        process = program(RUN.format(copy=str(copy), words=words), environ)
        said = process.communicate()
        assert process.wait() == 0, said


def _metrics(copy: Path, run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (copy / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def _installed(copy: Path) -> None:
    """Its entry points, as an installer writes them."""
    (points,) = blocks(RECIPES[NAMES], "toml")
    package = copy / "mine-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    found = re.sub(r'\[project\.entry-points\."(.*)"\]', r"[\1]", points).replace('"', "")
    (package / "entry_points.txt").write_text(found)


@pytest.mark.parametrize("name", CHANGES)
def test_a_recipe_fits_the_package(name: str, tmp_path: Path) -> None:
    for change in blocks(RECIPES[name], "diff"):
        for line in change.splitlines():
            if line.startswith("+++ "):
                path = tmp_path / line.removeprefix("+++ ")
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / line.removeprefix("+++ "), path)
        _written(re.sub(r"```python.*?```", "", RECIPES[name], flags=re.DOTALL), tmp_path)
    for path in tmp_path.rglob("*.py"):
        compile(path.read_text(), path, "exec")
        assert path.read_text() != (ROOT / path.relative_to(tmp_path)).read_text()


def test_every_part_that_can_be_added_has_commands() -> None:
    assert len(CHANGES) >= 5
    for name in [*CHANGES, "A schedule", "A dashboard", "A storage"]:
        assert list(_commands(RECIPES[name]))


@pytest.mark.slow
def test_a_schedule(copy: Path) -> None:
    write_codes(copy / "codes")
    _installed(copy)
    _run("A schedule", copy)
    for run in ("schedule", "by-name"):
        rates = [line["lr"] for line in _metrics(copy, run)]
        assert rates == pytest.approx([2e-3 * 0.005, 2e-3, 2e-3 * 0.5**0.5])


@pytest.mark.slow
def test_a_dashboard(copy: Path) -> None:
    write_codes(copy / "codes")
    _installed(copy)
    _run("A dashboard", copy)
    rows = list(csv.reader((copy / "runs/dashboard/loss.csv").open()))
    assert [(int(step), float(loss)) for step, loss in rows] == [
        (line["step"], line["loss"]) for line in _metrics(copy, "dashboard")
    ]


@pytest.mark.slow
def test_a_storage(copy: Path) -> None:
    write_pictures(copy / "pictures")
    _installed(copy)
    _run("A storage", copy)
    assert (copy / "prepared/manifest.json").is_file()
    assert _metrics(copy, "storage")[-1]["loss"] > 0


@pytest.mark.slow
def test_a_loss(copy: Path, dataset: str) -> None:
    (copy / "images").symlink_to(dataset)
    _run("A loss", copy)
    line = _metrics(copy, "loss")[0]
    assert line["charbonnier"] >= line["l1"] > 0


@pytest.mark.slow
def test_a_quantizer(copy: Path, dataset: str) -> None:
    (copy / "images").symlink_to(dataset)
    _run("A quantizer", copy)
    assert "rotation trick" in (copy / "exported/README.md").read_text()


@pytest.mark.slow
def test_a_backbone_block(copy: Path) -> None:
    write_codes(copy / "codes")
    _run("A backbone block", copy)
    assert _metrics(copy, "block")[-1]["loss"] > 0


@pytest.mark.slow
def test_an_optimizer(copy: Path) -> None:
    write_codes(copy / "codes")
    _run("An optimizer", copy)
    assert [line["step"] for line in _metrics(copy, "optimizer")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_validation_metric(copy: Path, dataset: str) -> None:
    (copy / "images").symlink_to(dataset)
    write_pictures(copy / "others", seed=1)
    prepare_images(copy / "others", str(copy / "held-out"))
    _run("A validation metric", copy)
    assert _metrics(copy, "metric")[-1]["validation_mae"] > 0
    assert "Mean absolute error" in (copy / "runs/metric/report.html").read_text()
