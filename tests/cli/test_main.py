"""The command line: quick help with examples, one or two lines for each misuse, exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from pathlib import Path

import pytest

from ibq_scale.cli.main import build_parser, main
from tests import nursery


def _leaves(parser: ArgumentParser) -> Iterator[ArgumentParser]:
    groups = [a for a in parser._actions if isinstance(a, _SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        for child in group.choices.values():
            yield from _leaves(child)


def test_every_command_has_an_example() -> None:
    leaves = list(_leaves(build_parser()))
    assert len(leaves) >= 14
    for leaf in leaves:
        assert (leaf.epilog or "").startswith("example: ibq-scale"), leaf.prog
        assert leaf.epilog.split()[1:3][1] == leaf.prog.split()[1], f"{leaf.prog}: the example is of another command"


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; from ibq_scale.cli.main import build_parser; build_parser().format_help();"
        "print([m for m in ('torch', 'numpy', 'deepspeed', 'pydantic', 's3fs') if m in sys.modules]);"
        "print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, cpu_seconds = done.stdout.splitlines()
    assert heavy == "[]"
    assert float(cpu_seconds) < 2.0


def _refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Runs a misuse in this process; returns what it says."""
    capsys.readouterr()
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ibq-scale: ")
    assert len(captured.err.strip().splitlines()) <= 2
    return captured.err


def test_a_misspelt_key_is_answered_with_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    said = _refused(capsys, "train", "tokenizer", "tiny", "data.train=x", "optimizer.learning_rate=1")
    assert "unknown key 'optimizer.learning_rate'" in said
    said = _refused(capsys, "config", "show", "tokenizer/tiny", "train.globl_batch=1")
    assert "did you mean 'train.global_batch'?" in said


def test_overrides_may_stand_behind_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "ar/tiny", "train.seed=1", "--json", "train.seed=2", "train.steps=7"]) == 0
    shown = json.loads(capsys.readouterr().out)["config"]["train"]
    assert (shown["seed"], shown["steps"]) == (2, 7)
    for words in (["--josn", "train.seed=2"], ["--json", "seed"]):
        with pytest.raises(SystemExit) as exit_:
            main(["config", "show", "ar/tiny", "train.seed=1", *words])
        assert exit_.value.code == 2


def test_a_misspelt_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'tokenizer/ibq-16384'?" in _refused(capsys, "train", "tokenizer", "ibq-16348")


def test_missing_data_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert "data.train" in _refused(capsys, "train", "ar", "b")


def test_an_empty_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = _refused(capsys, "prepare", "images", str(tmp_path / "empty"), "--to", str(tmp_path / "to"))
    assert "holds no pictures" in said
    assert not (tmp_path / "to").exists()


def test_a_missing_bucket(capsys: pytest.CaptureFixture[str], pictures: Path, s3_server: None) -> None:
    said = _refused(capsys, "prepare", "images", str(pictures), "--to", "s3://no-such-bucket/x")
    assert "bucket 'no-such-bucket' does not exist" in said


def test_a_file_that_is_no_image_loses_nothing(
    capsys: pytest.CaptureFixture[str], pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(pictures, tmp_path / "source")
    (tmp_path / "source/apples/readme.jpg").write_text("no picture")
    assert main(["prepare", "images", str(tmp_path / "source"), "--to", str(tmp_path / "to"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["rejected"]) == (24, 1)
    assert "readme.jpg" in (tmp_path / "to/rejects.jsonl").read_text()


def test_a_manifest_of_another_version(capsys: pytest.CaptureFixture[str], dataset: str, tmp_path: Path) -> None:
    values = json.loads((Path(dataset) / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"version": 2}))
    assert "has version 2, this program reads 1" in _refused(capsys, "data", "stats", str(tmp_path))


def test_data_commands(capsys: pytest.CaptureFixture[str], dataset: str, tmp_path: Path) -> None:
    assert main(["data", "stats", dataset, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 24
    assert main(["data", "verify", dataset]) == 0
    shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
    (tmp_path / "images-000000.tar").unlink()
    assert main(["data", "verify", str(tmp_path)]) == 1


def test_config_show_says_where_values_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "tokenizer/ibq-262144", "train.micro_batch=2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["quantizer"]["codebook_size"] == 262144
    assert shown["origins"]["train.micro_batch"] == "command line"
    assert shown["origins"]["quantizer.codebook_size"] == "tokenizer/ibq-262144"


def test_overrides_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ar/tiny", "model.depth=7", "--json", "model.heads=2"]
    assert main(["config", "show", *words]) == 0
    model = json.loads(capsys.readouterr().out)["config"]["model"]
    assert (model["depth"], model["heads"]) == (7, 2)
    for wrong in (["config", "show", "ar/tiny", "--json", "--depth=7"], ["config", "presets", "model.depth=7"]):
        with pytest.raises(SystemExit) as exit_:
            main(wrong)
        assert exit_.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_checkpoint_commands(capsys: pytest.CaptureFixture[str], tokenizer_dir: Path, tmp_path: Path) -> None:
    assert "does not exist" in _refused(capsys, "checkpoint", "ls", str(tmp_path / "absent"))
    assert "does not exist" in _refused(capsys, "checkpoint", "verify", str(tmp_path / "absent"))
    assert "is no whole checkpoint" in _refused(capsys, "checkpoint", "verify", str(tmp_path))
    assert main(["checkpoint", "ls", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["checkpoint", "export", str(tokenizer_dir), "--to", str(tmp_path / "to")]) == 0
    assert "not found" in _refused(capsys, "checkpoint", "import", "absent.ckpt", "--to", str(tmp_path / "new"))


def test_checkpoint_import_of_a_published_file(
    capsys: pytest.CaptureFixture[str], parity_dir: Path, tmp_path: Path
) -> None:
    from ibq_scale.pretrained.loading import load_tokenizer

    words = ["checkpoint", "import", str(parity_dir / "tokenizer_small.ckpt"), "--to", str(tmp_path / "to"), "--ema"]
    assert main(words) == 0
    load_tokenizer(tmp_path / "to")
    assert "not empty" in _refused(capsys, *words)


def test_sampling_options_are_checked_before_ranks_start(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = ["sample", "x", "--tokenizer", "y", "--to", str(tmp_path)]
    assert "--temperature must be above 0" in _refused(capsys, *base, "--temperature", "0")
    assert "write labels like" in _refused(capsys, *base, "--classes", "a")


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    """In processes of its own, as a user would, on two ranks."""
    return nursery.run([*words, "--ranks", "2"])


@pytest.mark.slow
@pytest.mark.distributed
def test_misuse_that_only_the_ranks_can_see(dataset: str, ar_dir: Path, tmp_path: Path) -> None:
    """World sizes, codebooks and checkpoints that do not fit: said once, not by every rank, and nothing is left."""
    train = ["train", "tokenizer", "tiny", f"data.train={dataset}", f"out={tmp_path / 'run'}"]
    cases = {
        "global_batch": _run(*train, "train.global_batch=12", "train.micro_batch=8"),
        "codebook": _run(*train, "quantizer.codebook_size=1001", "codebook_group=2"),
        "transformer": _run("evaluate", "reconstruction", str(ar_dir), dataset),
    }
    for needle, done in cases.items():
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2, done.stderr
        assert len(lines) <= 2, done.stderr
        assert needle in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m ibq_scale config show ar/xl | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.slow
def test_the_process_ends_after_its_threads_exit_handlers_and_output() -> None:
    """The interpreter's teardown is skipped, and nothing that a user or a library registered."""
    code = (
        "import atexit, sys, threading, time; from ibq_scale.cli import main;"
        "ended, leave = threading.Event(), main._leave; main._leave = lambda code: (ended.set(), leave(code));"
        "atexit.register(print, 'handler');"
        "threading.Thread(target=lambda: (ended.wait(), time.sleep(0.5), print('thread'))).start();"
        "sys.argv = ['ibq-scale', 'config', 'show', 'ar/xl'];"
        "main.main(); print('torn down')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["thread", "handler"], "in this order: handlers may end what threads use"


def test_output_that_cannot_be_written_is_no_success() -> None:
    code = "from ibq_scale.cli.main import _leave; print('x'); _leave(0)"
    with Path("/dev/full").open("w") as full:
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, env=buffered, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"ibq-scale: the output could not be written: [Errno 28]")
    assert len(done.stderr.splitlines()) == 1
