"""The schema decides: a text field takes the text as it was typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibq_scale.config.layers import flatten, load_resolved, resolve, to_yaml
from ibq_scale.errors import UserError
from ibq_scale.ladder.schema import load_ladder

TYPED = {
    "name": ["20241201", "2024-12-01", "007", "1e3", "1_000", "12:30:45", "on", "no", "True", ".5", "0x1F", "null"],
    "out": ["/runs/lr #2", "/runs/a: b", "/runs/{x}", "/runs/a, b", "/runs/[1]", "runs/'s", "- a", "!x", "&a", "%1"],
    "wandb.mode": ["off", "online"],
    "wandb.group": ["1", "off", "3.14"],
    "data.train": ["2024", "/data/a b #1", "s3://bucket/on"],
    "train.keep_best": ["-usage", "l1"],
    "deepspeed.config": ["0", "zero1"],
}  # fmt: skip
CASES = [(key, text) for key, texts in TYPED.items() for text in texts]


@pytest.mark.parametrize(("key", "text"), CASES)
def test_text_is_taken_as_it_was_typed(tmp_path: Path, key: str, text: str) -> None:
    config = resolve("tokenizer/tiny", [f"{key}={text}"]).config
    assert flatten(config.model_dump())[key] == text
    # And a run's own record reads back the same.
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert flatten(load_resolved(tmp_path / "config.yaml").model_dump())[key] == text


@pytest.mark.parametrize("text", ["20241201", "2024-12-01", "007", "1e3", "12:30:45", "on", "True", "1.10", "0x1F"])
def test_plain_scalars_of_a_file_are_text_where_text_is_wanted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    lines = f"preset: tokenizer/tiny\nname: {text}\nwandb: {{mode: off, group: {text}}}\ndata: {{train: [{text}, b]}}\n"
    path.write_text(lines, encoding="utf-8")
    config = resolve(str(path)).config
    assert (config.name, config.wandb.mode, config.wandb.group) == (text, "off", text)
    assert config.data.train == (text, "b")


def test_what_is_no_text_is_what_yaml_makes_of_it(tmp_path: Path) -> None:
    given = [
        "train.steps=1_000",
        "ema_decay=1e-1",
        "data.flip=yes",
        "out=null",
        "data.cache_dir=~",
        "train.samples=null",
    ]
    config = resolve("tokenizer/tiny", [*given, "data.train=[a, 2024]", "data.weights=[1,2]"]).config
    assert (config.train.steps, config.ema_decay, config.data.flip) == (1000, 0.1, True)
    assert (config.out, config.data.cache_dir, config.data.train) == (None, None, ("a", "2024"))
    assert resolve("tokenizer/tiny", ['name="a b"', "out='x'"]).config.run_dir == "x"
    (tmp_path / "run.yaml").write_text(
        "preset: tokenizer/tiny\nname: ${train.seed}\ntrain: {seed: 7}\n", encoding="utf-8"
    )
    assert resolve(str(tmp_path / "run.yaml")).config.name == "7"
    with pytest.raises(UserError, match=r"wandb.mode.*got 'false'"):
        resolve("tokenizer/tiny", ["wandb.mode=false"])
    for word in ("task=[1]", "train.lr=.nan", "ema_decay=.nan", "train.steps=.inf"):
        with pytest.raises(UserError):
            resolve("tokenizer/tiny", [word])


def test_the_home_folder_in_a_file_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(
        "preset: tokenizer/tiny\nout: ~/runs/tok\nvalidation: {data: ~/val}\ndata: {train: [~/a, /b/~c]}\n"
    )
    config = resolve(str(tmp_path / "run.yaml"), ["train.mirror=~/copy"]).config
    assert (config.run_dir, config.validation.data) == (f"{tmp_path}/runs/tok", f"{tmp_path}/val")
    assert (config.data.train, config.train.mirror) == ((f"{tmp_path}/a", "/b/~c"), f"{tmp_path}/copy")


def test_ladders_take_text_too() -> None:
    from ibq_scale.ladder.schema import ladder_names

    assert load_ladder(ladder_names()[0], ["out=/runs/lr #2"]).out == "/runs/lr #2"
    assert load_ladder(ladder_names()[0], ["name=20241201"]).name == "20241201"
