"""``nan`` and ``inf`` are refused wherever a number is given."""

from __future__ import annotations

import pytest

from ibq_scale.cli.main import main
from ibq_scale.config.layers import resolve
from ibq_scale.data.filters import parse_conditions
from ibq_scale.errors import UserError
from ibq_scale.models.sampling import SamplingSettings

WORDS = {
    "sample x --tokenizer y --to z": ("--guidance", "--temperature", "--top-p", "--guidance-power"),
    "prepare images x --to y": ("--max-aspect",),
    "plan ar/tiny": ("--memory", "--net"),
    "scale fit x": ("--flops",),
}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "x"])
@pytest.mark.parametrize(("command", "option"), [(c, o) for c, options in WORDS.items() for o in options])
def test_of_a_command(command: str, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), f"{option}={value}"])
    assert ended.value.code == 2
    assert f"'{value}' is not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["ema_decay", "data.weights", "loss.perceptual_weight", "quantizer.entropy_weight"])
def test_of_a_config(key: str) -> None:
    for value in (".nan", "nan", ".inf"):
        with pytest.raises(UserError, match=key):
            resolve("tokenizer/tiny", [f"{key}={f'[{value}]' if key == 'data.weights' else value}"])


def test_of_python_and_of_conditions() -> None:
    for settings in ({"guidance": float("nan")}, {"temperature": float("nan")}, {"top_p": float("inf")}):
        with pytest.raises(ValueError, match="finite"):
            SamplingSettings(**settings)
    with pytest.raises(UserError, match="nothing compares with nan"):
        parse_conditions(["width>=nan"])
