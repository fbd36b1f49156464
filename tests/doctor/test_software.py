"""Packages against their bounds, weights, W&B, the folder of compiled operators."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibq_scale.doctor import software
from ibq_scale.doctor.tools import Subject
from ibq_scale.findings import Finding


def test_packages_within_and_beyond_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = software.packages(Subject())
    assert line.level == "ok"
    assert "deepspeed 0.19.8" in line.text
    versions = {"deepspeed": "0.19.9", "webdataset": None}
    real = software.installed
    monkeypatch.setattr(software, "installed", lambda name: versions[name] if name in versions else real(name))
    monkeypatch.setattr(software.sys, "version_info", (3, 10, 4))
    assert software.packages(Subject()) == [
        Finding("FAIL", "packages", "deepspeed 0.19.9, where ==0.19.8 is asked for", "pip install 'deepspeed==0.19.8'"),
        Finding("FAIL", "packages", "webdataset is not installed", "pip install 'webdataset>=1.0.2'"),
        Finding("FAIL", "python", "3.10.4, where >=3.11 is asked for", "make the environment with a newer one"),
    ]


def test_bounds_come_with_an_installed_program_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkout = software._bounds()
    monkeypatch.setattr(software, "__file__", str(tmp_path / "ibq_scale/doctor/software.py"))
    python, wanted = software._bounds()
    assert python == checkout[0]
    assert any(text.startswith("deepspeed==") for text in wanted)


def test_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IBQ_SCALE_WEIGHTS", str(tmp_path))
    (line,) = software.weights(Subject())
    assert (line.level, line.text) == ("warn", f"no vgg, alex, inception, dino, dinov2 in {tmp_path}")
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"half a download")
    damaged, absent = software.weights(Subject())
    assert (damaged.level, damaged.todo) == ("FAIL", "ibq-scale fetch-weights vgg")
    assert absent.text.startswith("no alex, inception, dino, dinov2 in")


def test_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (line,) = software.wandb(Subject())
    assert line.level == "warn"
    (tmp_path / "netrc").write_text("machine wandb.site.example login user password p\n")
    (tmp_path / "netrc").chmod(0o600)
    assert software.wandb(Subject())[0].level == "warn"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.site.example")
    assert software.wandb(Subject())[0].text.endswith("logged in to wandb.site.example")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert software.wandb(Subject())[0].text.endswith("WANDB_MODE=offline")


def test_a_lock_that_a_killed_build_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert software.extensions()[0].level == "ok"
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam/lock").touch()
    (line,) = software.extensions()
    assert line.level == "warn"
    assert line.todo.endswith(f"rm {tmp_path}/cpu_adam/lock")
    monkeypatch.setattr(software, "is_shared", lambda path: True)
    (tmp_path / "cpu_adam/lock").unlink()
    assert software.extensions()[0].level == "warn"


def test_a_compiler_is_looked_for_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    line = software._compiler(None)
    assert (line.level, line.text) == ("warn", "no c++ and no ninja on PATH")
