"""The files of slurm/, filled in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ibq_scale.cluster.render import Script, double_quoted, environment_lines, parse_option, python_path_line
from ibq_scale.errors import UserError

TEXT = """#!/bin/bash
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8            # of any kind
#SBATCH --requeue
##SBATCH --partition=gpu             # yours
set -uo pipefail
# >>> modules
# module load cuda
# <<< modules
IBQ_SCALE=${IBQ_SCALE:-"x/ibq-scale"}
"""


def test_options_are_replaced_offered_ones_taken_new_ones_added_and_others_removed() -> None:
    script = Script(TEXT).with_options(
        {"nodes": "4", "gpus-per-node": "8", "partition": "main", "comment": "a b", "exclusive": "", "requeue": None}
    )
    options = [line for line in script.text.splitlines() if "SBATCH" in line]
    assert options == [
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=8            # of any kind",
        "#SBATCH --partition=main",
        '#SBATCH --comment="a b"',
        "#SBATCH --exclusive",
    ]
    assert script.option("comment") == "a b"
    assert script.option("exclusive") == ""
    assert script.option("requeue") is None
    assert Script(TEXT).option("partition") is None, "only offered"


def test_blocks_are_filled_and_the_command_is_set() -> None:
    script = (
        Script(TEXT).with_block("modules", ["module load a", "module load b"]).with_command("/opt/my dir/ibq-scale")
    )
    assert "# module load cuda\nmodule load a\nmodule load b\n# <<< modules\nIBQ_SCALE='/opt/my dir/ibq-scale'\n" in (
        script.text
    )
    with pytest.raises(UserError, match="no block"):
        script.with_block("container", ["x"])


@pytest.mark.parametrize("name", ["train_tokenizer", "train_ar"])
def test_the_files_of_the_project_have_what_is_filled_in(name: str) -> None:
    script = Script.of(name)
    for block in ("modules", "container", "environment"):
        script = script.with_block(block, [f"echo {block}"])
    script = script.with_command("/x/ibq-scale").with_options({"nodes": "3", "comment": "ibq-scale /a b"})
    assert "\nIBQ_SCALE=/x/ibq-scale\n" in script.text
    assert script.text.count("\n#SBATCH --nodes=") == 1
    for key in ("ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "output"):
        assert Script.of(name).option(key), f"{name}.sbatch sets no {key}, which submit reads or replaces"
    subprocess.run(["bash", "-n"], input=script.text, text=True, check=True)


@pytest.mark.parametrize("text", ["--reservation=x", "reservation=x", "#SBATCH --reservation=x"])
def test_an_option_in_any_of_its_spellings(text: str) -> None:
    assert parse_option(text) == ("reservation", "x")


@pytest.mark.parametrize("text", ["-p gpu", "--reservation x", "", "rm -rf"])
def test_what_is_no_option_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not an sbatch option"):
        parse_option(text)


def test_an_option_that_sbatch_would_read_otherwise_is_refused() -> None:
    with pytest.raises(UserError, match="no quotes, backslashes or line breaks"):
        Script(TEXT).with_options({"comment": 'a"b'})
    with pytest.raises(UserError, match="no quotes, backslashes or line breaks"):
        Script(TEXT).with_options({"comment": "a\nrm -rf"})


def test_values_of_the_environment_arrive_as_they_are_but_for_variables() -> None:
    lines = environment_lines({"A": 'it\'s "$X" `id` \\ *', "B": "plain"})
    done = subprocess.run(
        ["bash", "-c", "\n".join([*lines, 'printf "%s|%s" "$A" "$B"'])],
        env={"X": "inner"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == 'it\'s "inner" `id` \\ *|plain'
    with pytest.raises(UserError, match="not a variable name"):
        environment_lines({"A B": "x"})


@pytest.mark.parametrize(
    "value",
    [
        "$(touch {hit})",
        "`touch {hit}`",
        '"; touch {hit}; "',
        "${{X:-$(touch {hit})}}",
        "$((X[$(touch {hit})]))",
        "\\$(touch {hit})",
    ],
)
def test_no_value_runs_a_command(value: str, tmp_path: Path) -> None:
    value = value.format(hit=tmp_path / "hit")
    folder = value.replace(":", "")
    lines = [*environment_lines({"A": value}), f"WORDS=({double_quoted(value)})", python_path_line(folder)]
    program = "\n".join([*lines, 'printf "%s|%s|%s" "$A" "${WORDS[0]}" "$PYTHONPATH"'])
    done = subprocess.run(["bash", "-c", program], env={}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{value}|{value}|{folder}"
    assert not (tmp_path / "hit").exists()


def test_a_folder_that_pythonpath_cannot_name_is_refused() -> None:
    for folder in ("/a:b", "/a\nb"):
        with pytest.raises(UserError, match="PYTHONPATH cannot name"):
            python_path_line(folder)
    with pytest.raises(UserError, match="a line break cannot stand"):
        environment_lines({"A": "x\nrm -rf /"})


def test_an_array_is_not_an_option_like_others() -> None:
    """Its jobs would take other shares of the work than they are told."""
    with pytest.raises(UserError, match="by --array N"):
        parse_option("array=0-6:2")
