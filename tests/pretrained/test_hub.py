"""Models to the Hub and back, by the Hub's own library, against a server of its protocol."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ibq_scale.pretrained.exporting import export
from ibq_scale.pretrained.loading import load_ar, load_tokenizer
from tests.pretrained.hub_server import HubServer

LOAD = "import sys, ibq_scale; print(ibq_scale.Tokenizer.from_pretrained(sys.argv[1]).hash)"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    server = HubServer()
    yield server
    server.close()


def _python(hub: HubServer, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The library reads its environment when it is imported: hence processes of their own."""
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_pushed_model_is_loaded_by_its_address(hub: HubServer, tokenizer_dir: Path, tmp_path: Path) -> None:
    export(tokenizer_dir, tmp_path / "tok")
    (tmp_path / "tok/notes.txt").write_text("mine")
    command = ["-m", "ibq_scale", "checkpoint", "push", str(tmp_path / "tok"), "me/tok", "--private"]
    done = _python(hub, tmp_path / "home", *command)
    assert (done.returncode, done.stdout) == (0, "hf://me/tok\n"), done.stderr
    assert set(hub.files["me/tok"]) >= {"README.md", "codebook.safetensors", "config.json", "model.safetensors"}
    assert "notes.txt" not in hub.files["me/tok"]
    assert hub.private == {"me/tok"}
    loaded = _python(hub, tmp_path / "home", "-c", LOAD, "me/tok")
    assert loaded.stdout.strip() == load_tokenizer(tokenizer_dir).hash, loaded.stderr


@pytest.mark.slow
def test_what_is_not_there_is_an_error_of_a_line(hub: HubServer, tmp_path: Path, ar_dir: Path) -> None:
    done = _python(hub, tmp_path, "-c", LOAD, "hf://me/nothing")
    assert "UserError: cannot fetch hf://me/nothing: " in done.stderr.splitlines()[-1]
    done = _python(hub, tmp_path, "-m", "ibq_scale", "checkpoint", "push", str(tmp_path), "me/x")
    assert done.returncode == 2
    assert done.stderr.startswith(f"ibq-scale: {tmp_path} is no exported model (no config.json, model.safetensors")
    assert done.stderr.count("\n") == 1
    # An address is none of a path's business.
    assert torch.is_tensor(load_ar(str(ar_dir)).transformer.head.weight)
