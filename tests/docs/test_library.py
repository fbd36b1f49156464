"""docs/library.md: every block runs, and the loops learn."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch

from tests.docs.pages import ROOT, blocks, sections
from tests.nursery import program, rank_environ

PAGE = ROOT / "docs/library.md"


def _part(heading: str) -> str:
    (found,) = [text for text in sections(PAGE) if text.startswith(heading)]
    (block,) = blocks(found, "python")
    return block


def _run(block: str) -> tuple[dict[str, Any], str]:
    said = io.StringIO()
    names: dict[str, Any] = {"__name__": "page"}
    with redirect_stdout(said):
        exec(compile(block, "page", "exec"), names)
    return names, said.getvalue()


def test_five_lines_and_the_rates() -> None:
    names, _ = _run(blocks(PAGE, "python")[0] + _part("Rates"))
    assert names["out"].quantized.shape == names["z"].shape
    assert [group["lr"] for group in names["optimizer"].param_groups] == [1e-4, 1e-3]


def test_loops_are_short() -> None:
    for block in blocks(PAGE, "python"):
        assert len(block.splitlines()) < 60


@pytest.mark.slow
def test_the_speech_tokenizer_learns() -> None:
    names, said = _run(_part("Speech"))
    wave, out = names["wave"], names["out"]
    assert float(names["error"].detach()) < 0.6 * float(wave[names["real"]].square().mean()), said
    assert float(out.perplexity) > 20, said
    assert bool((out.indices == -1).any())


@pytest.mark.slow
def test_the_scales_learn_from_coarse_to_fine() -> None:
    names, _ = _run(_part("VAR"))
    assert [tuple(i.shape[1:]) for i in names["indices"]] == [(s, s) for s in names["SIZES"]]
    assert [tuple(x.shape[2:]) for x in names["inputs"]] == [(s, s) for s in names["SIZES"][1:]]
    assert names["coarse"][-1] < 0.5 * names["coarse"][0]
    torch.testing.assert_close(names["quantizer"].decode(names["indices"]), names["so_far"][-1])


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_share_a_codebook() -> None:
    processes = [program(_part("Several ranks"), environ) for environ in rank_environ(2)]
    said = [process.communicate() for process in processes]
    assert [process.wait() for process in processes] == [0, 0], said
    lines = said[0][0].splitlines()
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert lines[-1] == "(512, 16)"
