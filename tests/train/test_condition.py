"""Training on stored vectors: the same on any ranks and after a restart, and samples by captions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ibq_scale.data.sets import open_sets
from ibq_scale.errors import UserError
from ibq_scale.pretrained.exporting import export
from ibq_scale.pretrained.loading import load_ar
from ibq_scale.supervise.compatible import check_codes
from tests.ranks import run_ranks
from tests.samples import CAPTIONS, write_codes
from tests.train.reference import ar_losses, ar_run

WORDS = ("model.conditioning=embedding", "model.condition_tokens=4", "model.condition_width=8")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("captioned")
    for seed, name in enumerate(("train", "held-out")):
        write_codes(folder / name, seed, captions=True)
    return {name: str(folder / name) for name in ("train", "held-out")}


def test_codes_without_fitting_conditions_are_refused(codes: str, captioned: dict[str, str]) -> None:
    cases = {
        "holds no conditions: write its codes with 'ibq-scale tokenize --captions'": (codes, ()),
        "set model.condition_tokens=4 model.condition_width=8": (captioned["train"], ("model.condition_width=9",)),
    }
    for said, (url, words) in cases.items():
        run = ar_run(url, *WORDS, *words)
        with pytest.raises(UserError, match=said):
            check_codes(run, open_sets(run.data, "codes"))
    # A class-conditional model reads such codes as any others.
    assert check_codes(ar_run(captioned["train"]), open_sets(ar_run(captioned["train"]).data, "codes"))


@pytest.mark.slow
@pytest.mark.distributed
def test_conditions_train_the_same_on_any_ranks_and_after_a_restart(captioned: dict[str, str], tmp_path: Path) -> None:
    words = [*WORDS, f"validation.data={captioned['held-out']}", "validation.every=1", "train.steps=12"]
    runs = {f"zero{n}": ar_run(captioned["train"], *words, f"deepspeed.config=zero{n}") for n in (1, 3)}
    (expected,) = run_ranks(ar_losses, 1, {"one": runs["zero1"]}, tmp_path, 0, 12)
    parts = [run_ranks(ar_losses, 2, runs, tmp_path, *steps)[0] for steps in ((0, 5), (5, 12))]
    for name in runs:
        assert parts[0][name][:5] + parts[1][name] == pytest.approx(expected["one"], rel=1e-4), name
    # The captions tell the classes, and the labels are not read.
    classes = ar_run(captioned["train"], *words[3:], "model.conditioning=prefix", "model.classes=3")
    assert run_ranks(ar_losses, 1, {"classes": classes}, tmp_path, 0, 1)[0]

    exported = tmp_path / "exported"
    export(tmp_path / "zero3-12", exported)
    assert 'labels, condition=["a cat"]' in (exported / "README.md").read_text()
    ar = load_ar(exported)
    assert ar.encoder is not None
    assert ar.encoder.encoder == "hash:8"
    labels = torch.zeros(3, dtype=torch.int64)
    codes = ar.generate(labels, condition=CAPTIONS, greedy=True)
    assert torch.equal(codes, ar.generate(labels, condition=ar.encode(CAPTIONS), greedy=True))
    logits = ar(codes, labels, condition=CAPTIONS)
    assert torch.equal(logits.argmax(dim=-1), codes)
    assert not torch.allclose(logits[0], ar(codes, labels)[0])
    with pytest.raises(UserError, match=r"vectors \(1, 3, 8\) instead of \(B, 4, 8\)"):
        ar.generate(labels[:1], condition=ar.encode(["a"])._replace(vectors_BLC=torch.zeros(1, 3, 8)))
