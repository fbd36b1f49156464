"""Extensions are found by name, their faults are told in a line, and only a training imports them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from ibq_scale import extensions
from ibq_scale.checkpoint.reading import Checkpoint
from ibq_scale.config.layers import load_resolved, resolve, to_yaml
from ibq_scale.config.optimizer import ScheduleConfig
from ibq_scale.data.folder import LocalStore
from ibq_scale.data.store import open_store
from ibq_scale.errors import UserError
from ibq_scale.pretrained.loading import load_tokenizer
from ibq_scale.supervise.compatible import check_same_run
from ibq_scale.supervise.dashboards import dashboard_classes
from ibq_scale.train.schedule import lr_factor

MODULE = "an_extension"
CODE = """
from pathlib import Path
from ibq_scale.data.folder import LocalStore

def half(schedule, samples, total_samples):
    return 0.5

def broken(schedule, samples, total_samples):
    return float("nan")

class Numbers:
    pass

def memory(url):
    return LocalStore(Path(url.removeprefix("mem://")))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in an installed package with entry points."""
    (tmp_path / f"{MODULE}.py").write_text(CODE)
    package = tmp_path / "an_extension-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: an-extension\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        f"[ibq_scale.schedules]\nhalf = {MODULE}:half\ngone = {MODULE}:gone\n"
        f"[ibq_scale.dashboards]\nnumbers = {MODULE}:Numbers\n[ibq_scale.storages]\nmem = {MODULE}:memory\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    extensions.load.cache_clear()
    return MODULE


def test_schedules_by_entry_point_and_import_path(module: str) -> None:
    for kind in ("half", f"{module}:half"):
        schedule = ScheduleConfig(kind=kind, warmup_samples=10, warmup_factor=0.1)
        assert module not in sys.modules, "a config is only read"
        assert lr_factor(schedule, 0, 100) == 0.1, "warm-up stays the package's"
        assert lr_factor(schedule, 10, 100) == 0.5
        sys.modules.pop(module)
        extensions.load.cache_clear()


def test_a_schedule_that_is_no_factor(module: str) -> None:
    with pytest.raises(UserError, match="a factor of nan after 7 samples"):
        lr_factor(ScheduleConfig(kind=f"{module}:broken"), 7, 100)


def test_dashboards_and_storages_by_entry_point(module: str, tmp_path: Path) -> None:
    config = resolve("tokenizer/tiny", ["data.train=x", f"dashboards=[numbers,{module}:Numbers]"]).config
    assert load_resolved(_file(tmp_path, to_yaml(config))) == config
    assert module not in sys.modules
    classes = dashboard_classes(config)
    assert list(classes) == ["numbers", f"{module}:Numbers"]
    assert len(set(classes.values())) == 1
    store = open_store(f"mem://{tmp_path}/data")
    assert isinstance(store, LocalStore)
    assert store.url == f"{tmp_path}/data"


def test_unknown_names_are_told_with_the_nearest(module: str) -> None:
    for item, said in (
        ("schedule.kind=cosin", "schedule.kind: 'cosin' is unknown: did you mean 'cosine'?"),
        (
            "schedule.kind=halv",
            "did you mean 'half'? Known: steps, linear, wsd, cosine, constant, gone, half; or give module:attribute",
        ),
        ("schedule.kind=a-b:c", "'a-b:c' is unknown"),
        ("dashboards=[number]", "did you mean 'numbers'?"),
    ):
        with pytest.raises(UserError) as told:
            resolve("tokenizer/tiny", ["data.train=x", item])
        assert said in str(told.value)
        assert len(str(told.value).splitlines()) == 1


def test_what_cannot_be_imported_is_told_in_a_line(module: str, tmp_path: Path) -> None:
    (tmp_path / "half_written.py").write_text("import\n")
    for name, said in (
        ("gone", f"'{module}:gone' of ibq_scale.schedules cannot be imported: AttributeError"),
        ("absent_module:f", "'absent_module:f' of ibq_scale.schedules cannot be imported: ModuleNotFoundError"),
        ("half_written:f", "SyntaxError"),
        ("never", "no installed package has 'never'"),
    ):
        with pytest.raises(UserError) as told:
            extensions.load(extensions.SCHEDULES, name)
        assert said in str(told.value)
        assert len(str(told.value).splitlines()) == 1


def test_an_address_is_no_import_path(module: str) -> None:
    with pytest.raises(UserError, match="unknown scheme"):
        open_store(f"{module}:memory://x")
    with pytest.raises(UserError, match="unknown scheme 'gs'"):
        open_store("gs://bucket/x")
    assert module not in sys.modules


def test_another_persons_run_imports_nothing(module: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    theirs = resolve(
        "tokenizer/tiny", ["data.train=x", f"schedule.kind={module}:half", f"dashboards=[{module}:Numbers]"]
    ).config
    run = tmp_path / "run"
    step = run / "checkpoints/step-00000001"
    shutil.copytree(tokenizer_dir, step / "model")
    (run / "checkpoints/latest").write_text("step-00000001\n")
    (run / "config.yaml").write_text(to_yaml(theirs))
    saved = {
        name: value for name, value in theirs.model_dump(mode="json").items() if name not in ("model", "quantizer")
    }
    config = json.loads((step / "model/config.json").read_text())
    (step / "model/config.json").write_text(json.dumps(config | {"source": saved} | saved | {"kind": config["kind"]}))
    (step / "manifest.json").write_text(
        json.dumps({"format_version": 3, "step": 1, "samples": 1, "config": saved, "files": {}})
    )
    assert load_resolved(run / "config.yaml") == theirs
    load_tokenizer(step / "model")
    for folder in (step, run):
        load_tokenizer(folder)
    mine = resolve("tokenizer/tiny", ["data.train=x"]).config
    check_same_run(mine, Checkpoint(step, {"config": theirs.model_dump(mode="json")}))
    assert module not in sys.modules


def _file(folder: Path, text: str) -> Path:
    (folder / "config.yaml").write_text(text)
    return folder / "config.yaml"
