"""docs/fine-tuning.md: its part for two CPU cores, run as it stands with fewer steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import nursery
from tests.docs.pages import ROOT, commands, sections
from tests.samples import write_pictures

PAGE = ROOT / "docs/fine-tuning.md"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_decoder_is_tuned_on_other_pictures(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (part,) = [text for text in sections(PAGE) if text.startswith("On two CPU cores")]
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "faces", seed=1)
    first = ["train", "tokenizer", "tokenizer/tiny", f"data.train={dataset}", "out=runs/tok", "train.steps=1"]
    for words in (first, *commands(part)):
        short = [word.replace("train.steps=200", "train.steps=2") for word in words]
        done = nursery.run([*short, "data.workers=0"] if short[0] == "train" else short)
        assert done.returncode == 0, done.stderr
    before, after = (
        json.loads((tmp_path / f"results/{name}/reconstruction.json").read_text()) for name in ("before", "after")
    )
    assert after["usage"] == before["usage"]
    assert after["psnr"] > before["psnr"]
