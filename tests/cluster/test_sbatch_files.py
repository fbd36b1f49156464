"""The files of slurm/ as bash runs them: which commands, with containers and modules too. As ``submit`` fills them in,
unless a test says otherwise.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from ibq_scale.cluster.render import Script
from tests.ports import free_port

FILES = Path(__file__).resolve().parents[2] / "slurm"
TRAIN = ["train_tokenizer", "train_ar"]
NAMES = [*TRAIN, "tokenize", "sample", "evaluate"]
# Each notes how it was called, a line of words. srun goes on with its command, without its own options.
STAND_INS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "apptainer": 'while [ "$1" != /shared/images/ibq-scale.sif ]; do shift; done; shift; exec "$@"',
    "scontrol": 'case "$*" in *hostnames*) printf "node0\\nnode1\\n";; '
    '*job*) printf " Requeue=$REQUEUE x=0\n   Command=$COMMAND\n";; esac',
    "squeue": 'case "$*" in *%T*) echo "RUNNING node5";; *) echo node5;; esac',
    "scancel": "",
    "ibq-scale": 'case "$1" in job-ended) echo "$VERDICT";; step-ended) echo "$CAUSE";; train) exit 75;; '
    '*) [ "$CODE" != 138 ] || { kill -USR1 $PPID; sleep 1; }; exit "$CODE";; esac',
}
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[0-1]",
    "SLURM_CPUS_PER_TASK": "12",
    "SLURM_JOB_NUM_NODES": "1",
    "CODE": "0",
    "REQUEUE": "1",
    "COMMAND": "(null)",
    "VERDICT": "end 75 ",
}


def _enabled(text: str, block: str, only: str = "") -> str:
    """The lines that a block offers, as a person takes the '#' away; `only`: those that begin so."""
    begin, end = text.index(f"# >>> {block}\n") + len(f"# >>> {block}\n"), text.index(f"# <<< {block}\n")
    offered = re.compile(rf"^# (?={only}[\w+]*=|{only}export |{only}module )", re.MULTILINE)
    return text[:begin] + offered.sub("", text[begin:end]) + text[end:]


def _run(folder: Path, text: str, *words: str, **environ: str) -> list[str]:
    """Runs a script as Slurm's first node would; how the stand-ins were called. The command's code is the script's."""
    (folder / "bin").mkdir()
    for name, does in STAND_INS.items():
        note = f'[ "$#" = 0 ] || echo "{name} $*" >> {folder}/calls'
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{note}\n{does}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "job.sbatch").write_text(text)
    environment = os.environ | JOB | {"IBQ_SCALE": f"{folder}/bin/ibq-scale", "SLURM_SUBMIT_DIR": str(folder)} | environ
    environment.setdefault("CAUSE", environment["CODE"])
    environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(folder / "job.sbatch"), *words], env=environment, cwd=folder, capture_output=True, text=True
    )
    # The end of a run is judged; where it could not be, it is srun's code.
    _, *judged = environment["VERDICT"].split() or [""]
    code = int(judged[0] if judged else 75) if words[0] == "tiny" else int(environment["CAUSE"] or environment["CODE"])
    assert (done.returncode, done.stderr) == (code, "")
    assert not list(folder.glob(".failures-*")), "what the ranks would have left was to be cleared away"
    assert [log.read_text() for log in folder.glob("run/logs/*")] == [""] * (words[0] == "tiny")
    return (folder / "calls").read_text().splitlines()


def _words(name: str, folder: Path) -> list[str]:
    return ["tiny", f"out={folder}/run"] if name in TRAIN else ["/shared/runs/tok", "--json"]


def _command(name: str, folder: Path) -> str:
    return f"{folder}/bin/ibq-scale {name.replace('_', ' ')} {' '.join(_words(name, folder))}"


@pytest.mark.parametrize("name", NAMES)
def test_ranks_meet_at_a_port_where_nobody_listens(name: str, tmp_path: Path) -> None:
    text = Script.of(name).text
    meet = text.index("export MASTER_ADDR MASTER_PORT\n")
    told = f"{text[:meet]}echo $MASTER_PORT > {tmp_path}/port\n{text[meet:]}"
    free = free_port()
    job = {"SLURM_JOB_ID": str(free - 10000 - 7919), "SLURM_RESTART_COUNT": "1"}
    (tmp_path / "free").mkdir()
    _run(tmp_path / "free", told, *_words(name, tmp_path / "free"), **job)
    assert int((tmp_path / "port").read_text()) == free
    with socket.create_server(("127.0.0.1", free)):
        (tmp_path / "taken").mkdir()
        _run(tmp_path / "taken", told, *_words(name, tmp_path / "taken"), **job)
    assert int((tmp_path / "port").read_text()) > free


OWN = "--cpus-per-task=12 --kill-on-bad-exit=1"


@pytest.mark.parametrize("name", NAMES)
def test_all_that_a_file_offers_is_right_for_bash(name: str) -> None:
    text = Script.of(name).text
    for block in ("modules", "container", "environment"):
        before = text
        text = _enabled(text, block)
        assert text.count("\n#") < before.count("\n#"), f"{name} offers nothing in '{block}'"
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("name", NAMES)
def test_plainly(name: str, tmp_path: Path) -> None:
    calls = _run(tmp_path, Script.of(name).text, *_words(name, tmp_path))
    assert f"srun {OWN} {_command(name, tmp_path)}" in calls


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_finds_common_sh(name: str, beside: bool, tmp_path: Path) -> None:
    """Where Slurm says that the original is, for it runs a copy; else where IBQ_SCALE_SLURM says."""
    folder = FILES
    if not beside:
        folder = tmp_path / "of mine"
        shutil.copytree(FILES, folder)
    place = {"COMMAND": f"{FILES}/{name}.sbatch x out=a/b"} if beside else {"IBQ_SCALE_SLURM": str(folder)}
    calls = _run(tmp_path, (FILES / f"{name}.sbatch").read_text(), *_words(name, tmp_path), **place)
    assert f"srun {OWN} {_command(name, tmp_path)}" in calls


@pytest.mark.parametrize("name", NAMES)
def test_in_a_container_of_pyxis(name: str, tmp_path: Path) -> None:
    text = _enabled(Script.of(name).text, "container", "SRUN")
    calls = _run(tmp_path, text, *_words(name, tmp_path))
    options = "--container-image=/shared/images/ibq-scale.sqsh --container-mounts=/shared:/shared,/tmp:/tmp"
    assert f"srun {OWN} {options} {_command(name, tmp_path)}" in calls
    steps = [call for call in calls if call.startswith("srun ")]
    assert all(options in step for step in steps), "job-ended runs in there too"
    assert len(steps) == (2 if name in TRAIN else 1)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_container_of_apptainer(name: str, tmp_path: Path) -> None:
    text = _enabled(Script.of(name).text, "container", "INSIDE")
    calls = _run(tmp_path, text, *_words(name, tmp_path))
    inside = "exec --nv --bind /shared,/tmp /shared/images/ibq-scale.sif"
    assert f"srun {OWN} apptainer {inside} {_command(name, tmp_path)}" in calls
    assert f"apptainer {inside} {_command(name, tmp_path)}" in calls
    assert f"ibq-scale {_command(name, tmp_path).partition(' ')[2]}" in calls


@pytest.mark.parametrize("name", NAMES)
def test_modules_are_loaded_first(name: str, tmp_path: Path) -> None:
    text = _enabled(Script.of(name).text, "modules")
    shell = f'module() {{ echo "module $*" >> {tmp_path}/calls; }}\n'
    calls = _run(tmp_path, text.replace("\n# >>> modules", f"\n{shell}# >>> modules"), *_words(name, tmp_path))
    assert calls[:2] == ["module purge", "module load cuda/12.8"]


TASK = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "12"}
TASK |= {"SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize("name", ["tokenize", "sample"])
def test_a_task_of_an_array_makes_its_part(name: str, tmp_path: Path) -> None:
    calls = _run(tmp_path, Script.of(name).text, *_words(name, tmp_path), **TASK)
    assert f"srun {OWN} {_command(name, tmp_path)} --part 2/4" in calls


@pytest.mark.parametrize(
    ("code", "more", "goes"),
    [
        ("71", {}, True),
        ("143", {"CAUSE": "71"}, True),
        ("71", {"CAUSE": ""}, True),
        ("71", {"SLURM_RESTART_COUNT": "3"}, False),
        ("71", {"SLURM_JOB_NUM_NODES": "2"}, False),
        ("1", {}, False),
    ],
)
@pytest.mark.parametrize("array", [{}, TASK])
@pytest.mark.parametrize("name", ["tokenize", "sample"])
def test_a_task_leaves_a_broken_node(
    name: str, array: dict[str, str], code: str, more: dict[str, str], goes: bool, tmp_path: Path
) -> None:
    """Which of several nodes it was, nobody has written down."""
    text = Script.of(name).text
    environ = {"CODE": code, "SLURM_JOB_NODELIST": "node3"} | array | more
    calls = _run(tmp_path, text, *_words(name, tmp_path), **environ)
    job = "7_12" if array else "7"
    does = [f"scontrol requeue {job}", f"scontrol update JobId={job} ExcNodeList=node5,node3"]
    assert [call for call in calls if "JobId=" in call or "requeue" in call] == does * goes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenize", "sample"])
def test_the_time_limit_is_no_failure(name: str, tmp_path: Path) -> None:
    """The signal before it ends the waiting for ranks that are at work."""
    calls = _run(tmp_path, Script.of(name).text, *_words(name, tmp_path), CODE="138")
    assert "scontrol requeue 7" in calls
    assert not [call for call in calls if "step-ended" in call]


@pytest.mark.parametrize(
    ("verdict", "requeue", "does"),
    [
        ("requeue 75 ", "1", ["scontrol requeue 7"]),
        (
            "requeue 75 node1,node3",
            "1",
            ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=node5,node1,node3"],
        ),
        ("end 75 ", "1", []),
        ("end 75 8,9", "1", ["scancel --state=PENDING 8 9"]),
        ("end 75 ", "0", []),
        ("end 2 ", "1", []),
        ("", "1", []),
    ],
)
@pytest.mark.parametrize("name", TRAIN)
def test_the_end_of_a_training_job(name: str, verdict: str, requeue: str, does: list[str], tmp_path: Path) -> None:
    text = Script.of(name).text
    calls = _run(tmp_path, text, *_words(name, tmp_path), VERDICT=verdict, REQUEUE=requeue)
    (asked,) = [call for call in calls if call.startswith("ibq-scale job-ended")]
    assert re.sub(r"--seconds \d+", "--seconds N", asked) == (
        f"ibq-scale job-ended {tmp_path}/run --code 75 --seconds N --attempts 3{' --stays' * (requeue == '0')}"
    )
    after = calls[calls.index(asked) + 1 :]
    assert [call for call in after if not call.startswith("squeue")] == does
