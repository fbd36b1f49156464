"""What a job runs is what was there when it was submitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ibq_scale
from ibq_scale.cluster import snapshot
from ibq_scale.cluster.snapshot import Source
from ibq_scale.config.layers import load_resolved, resolve
from ibq_scale.errors import UserError

CONFIG = resolve("tokenizer/tiny", ["data.train=x"]).config


def test_code_and_config_are_copied_and_the_copy_is_what_runs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    snapped = snapshot.take(snapshot.next_folder(run), CONFIG)
    assert snapped.folder == run / "submitted/001"
    assert load_resolved(snapped.config) == CONFIG
    code = snapped.pythonpath
    assert code is not None
    assert not list(code.rglob("__pycache__"))
    # Edited after the copy was made, here in the copy itself: only whoever imports from there sees it.
    with (code / "ibq_scale/__init__.py").open("a") as f:
        f.write("\n__version__ = 'of the snapshot'\n")
    words = "from ibq_scale.config.deepspeed import find_config; import ibq_scale; print(ibq_scale.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", f"{words}; print(find_config('zero2'))"],
        env=os.environ | {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"},
        cwd=Path(ibq_scale.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[:2] == ["of the snapshot", str(code / "deepspeed_configs/zero2.json")]
    assert snapshot.next_folder(run) == run / "submitted/002"


def _checkout(root: Path) -> None:
    (root / "ibq_scale").mkdir(parents=True)
    (root / ".gitignore").write_text("*.log\n")
    (root / "ibq_scale/a.py").write_text("committed")
    (root / "ibq_scale/gone.py").write_text("committed")
    (root / "notes.txt").write_text("not code")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)


def test_of_a_checkout_the_files_as_they_are_and_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkout"
    _checkout(root)
    (root / "ibq_scale/__init__.py").write_text("")
    (root / "ibq_scale/a.py").write_text("changed")
    (root / "ibq_scale/gone.py").unlink()
    (root / "ibq_scale/debug.log").write_text("ignored")
    monkeypatch.setattr(ibq_scale, "__file__", str(root / "ibq_scale/__init__.py"))
    source = Source.here()
    assert source.root == root
    assert source.changed
    snapped = snapshot.take(tmp_path / "run/submitted/001", CONFIG)
    copied = {str(p.relative_to(snapped.folder / "code")) for p in (snapped.folder / "code").rglob("*") if p.is_file()}
    assert copied == {"COMMIT", "ibq_scale/__init__.py", "ibq_scale/a.py"}
    assert (snapped.folder / "code/ibq_scale/a.py").read_text() == "changed"
    assert (snapped.folder / "code/COMMIT").read_text() == f"{source.commit}+changes\n"


def test_of_an_installed_package_only_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ibq_scale, "__file__", str(tmp_path / "lib/site-packages/ibq_scale/__init__.py"))
    snapped = snapshot.take(tmp_path / "run/submitted/001", CONFIG)
    assert snapped.pythonpath is None
    assert not (snapped.folder / "code").exists()
    assert "no copy" in str(snapped.source)
    snapped.record(jobs=["1"])
    assert json.loads((snapped.folder / "submission.json").read_text())["source"]["version"] == ibq_scale.__version__


def test_a_json_of_deepspeed_belongs_to_the_config(tmp_path: Path) -> None:
    own = tmp_path / "mine.json"
    own.write_text('{"zero_optimization": {"stage": 1}}')
    config = resolve("tokenizer/tiny", ["data.train=x", f"deepspeed.config={own}"]).config
    snapped = snapshot.take(tmp_path / "run/submitted/001", config)
    own.unlink()
    kept = Path(load_resolved(snapped.config).deepspeed.config)
    assert kept.parent == snapped.folder
    assert json.loads(kept.read_text()) == {"zero_optimization": {"stage": 1}}


@pytest.mark.slow
def test_two_submissions_at_once_do_not_share_a_snapshot(tmp_path: Path) -> None:
    folder = snapshot.next_folder(tmp_path / "run")
    snapshot.take(folder, CONFIG)
    with pytest.raises(UserError, match="run this again"):
        snapshot.take(folder, CONFIG)
    assert load_resolved(folder / "config.yaml") == CONFIG


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        snapshot.take(tmp_path / "file/run/submitted/001", CONFIG)


def test_jobs_of_all_submissions(tmp_path: Path) -> None:
    for n, jobs in enumerate((["1", "2"], ["3"])):
        folder = tmp_path / f"submitted/{n + 1:03d}"
        folder.mkdir(parents=True)
        (folder / "submission.json").write_text(json.dumps({"jobs": jobs}))
    (tmp_path / "submitted/003").mkdir()
    (tmp_path / "submitted/003/submission.json").write_text("{")
    assert snapshot.submitted_jobs(tmp_path) == ["1", "2", "3"]


def test_what_is_no_jobs_number_reaches_no_command(tmp_path: Path) -> None:
    """A run directory comes from anybody, and these become words of scancel."""
    folder = tmp_path / "submitted/001"
    folder.mkdir(parents=True)
    (folder / "submission.json").write_text('{"jobs": ["7", "--user=me", 8, "9_3", "10;rm", "7 8"]}')
    assert snapshot.submitted_jobs(tmp_path) == ["7", "9_3"]
    assert snapshot.chained_after(tmp_path, "7") == ("9_3",)
