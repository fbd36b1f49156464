"""What a shell is told when somebody presses tab."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ibq_scale.cli.main import main

PROGRAM = "import sys; from ibq_scale.cli.main import main; sys.argv[0] = 'ibq-scale'; raise SystemExit(main())"


def _complete(line: str, tmp_path: Path) -> set[str]:
    """The completions of a command line, as the code of `ibq-scale completion bash` asks for them."""
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=os.environ | asked, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return {word.strip() for word in answer.read_text().split("\n")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "among", "absent"),
    [
        ("ibq-scale tra", {"train"}, {"sample"}),
        ("ibq-scale train tokenizer ibq-1", {"ibq-1024", "ibq-16384"}, {"ar/xl", "xl"}),
        ("ibq-scale submit ar/", {"ar/xl", "ar/7b"}, {"tokenizer/ibq-1024"}),
        ("ibq-scale train ar xl train.gl", {"train.global_batch="}, {"train.grace="}),
        ("ibq-scale train ar xl quant", set(), {"quantizer.kind="}),
        ("ibq-scale train tokenizer x.yaml quantizer.kind=", {"quantizer.kind=ibq", "quantizer.kind=lfq"}, set()),
        ("ibq-scale submit ar/xl deepspeed.config=zero", {"deepspeed.config=zero3"}, {"deepspeed.config=zero4"}),
        ("ibq-scale submit ar/xl model.compile=", {"model.compile=true"}, set()),
        ("ibq-scale scale plan ", {"cpu", "published", "mine.yaml"}, {"ar/xl"}),
        ("ibq-scale scale plan cpu rate.", {"rate.lr="}, {"train.grace="}),
        ("ibq-scale train ar mi", {"mine.yaml"}, {"mine.txt"}),
        ("ibq-scale sample x --guidance-s", {"--guidance-schedule"}, {"--guidance"}),
    ],
)
def test_words_are_completed(line: str, among: set[str], absent: set[str], tmp_path: Path) -> None:
    for name in ("mine.yaml", "mine.txt"):
        (tmp_path / name).touch()
    words = _complete(line, tmp_path)
    assert among <= words
    assert not absent & words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_code(shell: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ibq_scale", "completion", shell]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "ibq-scale" in code
    if shell == "bash":
        (tmp_path / "code").write_text(code)
        subprocess.run(["bash", "-n", str(tmp_path / "code")], check=True)
    with pytest.raises(SystemExit) as refused:
        main(["completion", "powershell"])
    assert refused.value.code == 2
