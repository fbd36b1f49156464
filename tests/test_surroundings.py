"""Places and locales that people have: no home, no UTF-8, a shell inside of Slurm, a folder that cannot be written."""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ibq_scale
from ibq_scale.cli import options
from ibq_scale.distributed.environment import is_launched
from ibq_scale.errors import UserError
from ibq_scale.report import page
from ibq_scale.train import run

PACKAGE = Path(ibq_scale.__file__).parent
TEXT_MODES = {"r", "w", "a", "x"}
# As a user id that is in no passwd file.
NOBODY = "import pwd\n\ndef _none(uid):\n    raise KeyError(uid)\n\npwd.getpwuid = _none\n"
ASK_HOME = "import ibq_scale.cli, getpass; from pathlib import Path; print(Path.home(), getpass.getuser())"


def _calls_without_an_encoding() -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or {"encoding", None} & {k.arg for k in node.keywords}:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            of_module = isinstance(owner, ast.Name) and owner.id in ("Image", "tarfile", "os")
            mode = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            opens = name == "open" and not of_module and owner is not None and (not node.args or mode in TEXT_MODES)
            runs = any(k.arg == "text" for k in node.keywords) and name in ("run", "Popen", "check_output")
            if opens or runs or (name in ("read_text", "write_text") and owner is not None):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}"


def test_every_text_file_is_utf8_whatever_the_locale() -> None:
    assert list(_calls_without_an_encoding()) == []


def _python(code: str, tmp_path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")}
    path = f"{tmp_path}{os.pathsep}{PACKAGE.parent}"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"PYTHONPATH": path, "TMPDIR": str(tmp_path)} | environ,
        capture_output=True,
        encoding="latin-1",
        check=False,
    )


def test_without_a_home_a_folder_of_ones_own_stands_in(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOBODY)
    said = _python(ASK_HOME, tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    home, user = said.stdout.split()
    assert (Path(home), user) == (tmp_path / f"ibq-scale-home-{os.getuid()}", str(os.getuid()))
    assert Path(home).stat().st_mode & 0o77 == 0
    assert _python(ASK_HOME, tmp_path, HOME="/of/mine", USER="me").stdout.split() == ["/of/mine", "me"]


def test_no_name_is_too_odd_for_a_terminal(tmp_path: Path) -> None:
    code = "import ibq_scale.cli, sys; print('猫\\udcff'); print('猫', file=sys.stderr)"
    said = _python(code, tmp_path, PYTHONIOENCODING="ascii", HOME="/")
    assert (said.returncode, said.stdout, said.stderr) == (0, "\\u732b\\udcff\n", "\\u732b\n")


def test_a_command_reads_names_of_files_as_utf8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "猫.yaml").write_text("preset: tokenizer/tiny\nname: 犬\n", encoding="utf-8")
    words = [sys.executable, "-m", "ibq_scale", "config", "show", "猫.yaml"]
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONPATH": str(PACKAGE.parent)}
    said = subprocess.run(words, cwd=tmp_path, env=os.environ | ascii_only, capture_output=True, check=False)
    assert said.returncode == 0, said.stderr
    assert "犬" in said.stdout.decode()


@pytest.mark.parametrize(
    ("environ", "words", "launched"),
    [
        # The shell of srun --pty bash is one task.
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ["--ranks", "2"], False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, ["--ranks", "2"], False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, [], True),
        ({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, ["--ranks", "2"], True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "RANK": "0"}, ["--ranks", "2"], True),
    ],
)
def test_ranks_that_were_typed_count_in_a_step_of_one_task(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], words: list[str], launched: bool
) -> None:
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    names, settings = options.RANKS
    parser.add_argument(*names, **settings)
    args = parser.parse_args(words)
    assert args.ranks == (2 if words else None)
    assert is_launched() == launched


def test_a_page_that_cannot_be_written_fails_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        page.write(tmp_path / "report.html", "a run", "", [])
    for fault in (UserError("no room"), UnicodeEncodeError("ascii", "猫", 0, 1, "not in range"), KeyError("x")):

        def fails(*_: object, fault: Exception = fault) -> None:
            raise fault

        monkeypatch.setattr(run, "write_report", fails)
        run._report(tmp_path)
        assert "report.html could not be written" in capsys.readouterr().err
