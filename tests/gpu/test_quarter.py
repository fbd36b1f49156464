"""The quarter of an hour on a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from ibq_scale.cli.main import build_parser
from tests.gpu import quarter
from tests.gpu.stages import Command, Options, stages

PYTHON = sys.executable


def _rows(out: Path) -> dict[str, dict[str, object]]:
    found = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in found["rows"]}


def test_a_command_that_fails_or_hangs_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The grandchild must end too: it would keep the GPU.
    hanging = f"echo $$ > {tmp_path}/pids; sleep 99 & echo $! >> {tmp_path}/pids; wait"
    commands = {
        "one": [
            Command("fails", (PYTHON, "-c", "raise SystemExit('no kernel')"), 60),
            Command("hangs", ("sh", "-c", hanging), 3),
        ],
        "two": [Command("works", (PYTHON, "-c", 'print("words"); print(\'{"rate": 3}\'); print("more")'), 60)],
    }
    monkeypatch.setattr(quarter, "stages", lambda _: commands)
    monkeypatch.setattr(quarter, "LEAST_S", 1)
    assert quarter.main([str(tmp_path)]) == 1
    rows = _rows(tmp_path)
    assert [row["outcome"] for row in rows.values()] == ["failed", "too long", "ok"]
    assert rows["fails"]["tail"] == "no kernel\n"
    assert rows["works"]["figures"] == {"rate": 3}
    assert "=== two: works: ok" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    for pid in (tmp_path / "pids").read_text(encoding="utf-8").split():
        _assert_ends(int(pid))


def _assert_ends(pid: int) -> None:
    for _ in range(600):
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} still runs")


def test_what_does_not_fit_into_the_time_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {"one": [Command("works", (PYTHON, "-c", "print()"), 60)]}
    monkeypatch.setattr(quarter, "stages", lambda _: commands)
    assert quarter.main([str(tmp_path), "--seconds", "5"]) == 1
    assert _rows(tmp_path)["works"]["outcome"] == "not run"


def test_an_unknown_stage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        quarter.main([str(tmp_path), "--stages", "nothing"])
    assert "nothing is none of environment, steps" in capsys.readouterr().err


def test_pytests_counts_are_figures() -> None:
    assert quarter.figures_of("... [100%]\n=== 1 failed, 12 passed, 3 skipped in 2.1s ===\n") == {
        "failed": 1,
        "passed": 12,
        "skipped": 3,
    }


def test_every_command_of_full_size_is_accepted(tmp_path: Path) -> None:
    parser, names = build_parser(), []
    for commands in stages(Options(tmp_path, tmp_path)).values():
        for command in commands:
            assert command.limit_s >= quarter.LEAST_S
            if command.argv[1:3] == ("-m", "ibq_scale"):
                names.append(command.name)
                words = parser.parse_args(command.argv[3:])
                if hasattr(words, "check"):
                    words.check(words)
    assert {"auto", "eager", "compiled", "xl fp8 compiled", "sample", "stream"} <= set(names)


@pytest.mark.long
def test_all_stages_run_on_a_cpu_at_tiny_sizes(tmp_path: Path) -> None:
    assert os.environ.get("OMP_NUM_THREADS") == "1"
    quarter.main([str(tmp_path), "--small", "--seconds", "1500"])
    rows = _rows(tmp_path)
    assert {name: row["outcome"] for name, row in rows.items() if row["outcome"] not in ("ok", "too long")} == {}
    assert rows["resume tokenizer/tiny"]["outcome"] == "ok"
