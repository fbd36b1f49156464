"""What works where only the package's own few dependencies are installed, without the extra 'train'."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ibq_scale.cli.main import OF_TRAINING
from tests.ports import free_port
from tests.train.runs import words

ROOT = Path(__file__).resolve().parents[1]
# As if none of these packages were there.
WITHOUT = f"""
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OF_TRAINING | {"fsspec", "botocore", "aiobotocore"}!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
USE = """
import torch, ibq_scale
tokenizer = ibq_scale.load_tokenizer(sys.argv[1])
images = torch.rand(2, 3, 16, 16) * 2 - 1
codes = tokenizer.encode(images)
assert tokenizer.decode(codes).shape == images.shape
ar = ibq_scale.load_ar(sys.argv[2])
assert ar.generate(torch.tensor([0, 1]), guidance=2.0, seed=0).shape == (2, ar.config.tokens)
"""
COMMAND = "from ibq_scale.cli.main import main; raise SystemExit(main(sys.argv[1:]))"


def _python(program: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, "-c", WITHOUT + program, *words], os.environ | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_the_names_are_those_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {Requirement(text).name.replace("-", "_") for text in project["optional-dependencies"]["train"]}
    assert extra - {"setuptools"} == OF_TRAINING


@pytest.mark.slow
def test_models_are_loaded_and_used_without_what_training_needs(tokenizer_dir: Path, ar_dir: Path) -> None:
    done = _python(USE, str(tokenizer_dir), str(ar_dir))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_command_that_needs_more_says_so_in_a_line(dataset: str, tokenizer_dir: Path) -> None:
    done = _python(COMMAND, "bench", "quantizer", "--tokens", "8", "--codes", "8")
    assert done.returncode == 2, done.stderr
    assert done.stderr == "ibq-scale: this needs psutil: pip install 'ibq-scale[train]'\n"
    # As a rank, which has its own way to end.
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = _python(COMMAND, "evaluate", "reconstruction", str(tokenizer_dir), dataset, **rank)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "ibq-scale: this needs simplejpeg: pip install 'ibq-scale[train]'\n"
    assert _python(COMMAND, "config", "show", "ar/xl").returncode == 0


@pytest.mark.slow
def test_a_rank_that_compiles_nothing_does_not_import_the_compiler(dataset: str, tmp_path: Path) -> None:
    """A real start, since the tests' own fork server has imported it."""
    tell = "import atexit; atexit.register(lambda: print('torch._inductor.compile_fx' in sys.modules))"
    run = "from ibq_scale.cli.main import main; main()"
    command = words(dataset, tmp_path / "run", "train.steps=1", "train.micro_batch=8", "data.workers=0")
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    rank["MASTER_PORT"] = str(free_port())
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{tell}\n{run}", *command],
        env=os.environ | rank,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
