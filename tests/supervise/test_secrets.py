"""Of the environment's secrets nothing is in what a run says or leaves: logs, config, environment, report, W&B."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import nursery
from tests.samples import SMALL_AR, write_codes

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEBYaDEXAMPLETOKEN",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
}


@pytest.mark.slow
def test_no_secret_is_in_what_a_run_says_or_leaves(
    new_prefix: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, run = new_prefix(), tmp_path / "run"
    write_codes(codes)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    words = [
        "train",
        "ar",
        "tiny",
        *SMALL_AR,
        f"data.train={codes}",
        f"out={run}",
        "train.steps=2",
        "train.log_every=1",
    ]
    words += ["wandb.mode=offline", "tensorboard=true", "train.global_batch=4", "train.micro_batch=4", "--ranks", "1"]
    done = nursery.run(words)
    assert done.returncode == 0, done.stderr
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = {path.relative_to(run).parts[0] for path in left if path.is_relative_to(run)}
    assert {"config.yaml", "environment.json", "logs", "report.html", "wandb", "tensorboard"} <= names
    for name, value in SECRETS.items():
        assert value not in done.stdout + done.stderr, name
        assert [str(path) for path, content in left.items() if value.encode() in content] == [], name
