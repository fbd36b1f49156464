"""README and docs say what is so: their commands parse, their files are there, their words come from the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ibq_scale.cli.main import _parse
from ibq_scale.config.layers import resolve
from ibq_scale.ladder.schema import load_ladder
from tests.docs.pages import PAGES, ROOT, blocks, commands

CODE = "\n".join(path.read_text() for path in (ROOT / "ibq_scale").rglob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses_and_its_config_is_right(page: Path) -> None:
    for words in commands(page):
        args = _parse(words)
        given = getattr(args, "source", getattr(args, "ladder", ""))
        if str(given).endswith((".yaml", ".yml")):
            continue
        if given in ("tokenize", "sample", "evaluate"):
            # What is submitted, and not trained, is a command of its own.
            _parse([given, *args.overrides])
        elif hasattr(args, "ladder"):
            load_ladder(args.ladder, args.overrides)
        elif hasattr(args, "overrides"):
            resolve(args.source, args.overrides, getattr(args, "task", None))


def test_there_are_commands_to_parse() -> None:
    assert sum(1 for page in PAGES for _ in commands(page)) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_ours_that_are_named_are_there(page: Path) -> None:
    named = re.findall(r"`((?:tests|ibq_scale|slurm|docs|deepspeed_configs)/[\w./-]*)`", page.read_text())
    for name in named:
        assert (ROOT / name).exists(), name


def test_symptoms_are_in_the_words_that_the_program_uses() -> None:
    """Those that test_troubleshooting.py does not plant."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    for symptom in (
        "own_step_s",
        "holds up the others",
        "save_stall_s",
        "logit_gap",
        "every rank is alive",
        "alive, in",
        "another job trains in",
        "is no whole checkpoint",
        "THIS CHECKPOINT COULD NOT BE WRITTEN",
        "is less than the shards in use",
        "changed while it was read",
        "failed first",
        "killed by",
        "no rank tells of a first cause",
    ):
        assert symptom in text, symptom
        assert symptom in CODE, symptom


def test_python_blocks_are_python() -> None:
    found = [block for page in PAGES for block in blocks(page, "python")]
    assert len(found) >= 3
    for block in found:
        compile(block, "page", "exec")
