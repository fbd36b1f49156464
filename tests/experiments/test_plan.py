"""The declared runs: what they compare differs in nothing else, and a cut leaves whole rows."""

from __future__ import annotations

import pytest

from ibq_scale.config.layers import flatten, resolve
from ibq_scale.errors import UserError
from ibq_scale.experiments.plan import CONFIGURATIONS, PRESET, SEEDS, trials


def _config(name: str) -> dict[str, object]:
    (configuration,) = (c for c in CONFIGURATIONS if c.name == name)
    return flatten(resolve(PRESET, configuration.overrides, "tokenizer").config.model_dump())


def _differences(a: str, b: str) -> set[str]:
    one, other = _config(a), _config(b)
    return {key for key in one | other if one.get(key) != other.get(key)}


def test_every_configuration_is_a_valid_run_with_a_name_of_its_own() -> None:
    names = [c.name for c in CONFIGURATIONS]
    assert len(set(names)) == len(names)
    for name in names:
        assert _config(name)["loss.perceptual"] == "none", "runs need no weights of others"


@pytest.mark.parametrize("prefix", ["ibq-1024 vq-1024", "ibq-16384 vq-16384", "long-ibq-16384 long-vq-16384"])
def test_the_baseline_differs_in_the_quantizer_alone(prefix: str) -> None:
    assert _differences(*prefix.split()) == {"quantizer.kind"}


def test_the_ladder_differs_in_the_codebooks_size_alone() -> None:
    assert _differences("short-1024", "short-16384") == {"quantizer.codebook_size"}
    assert _differences("short-1024", "short-262144") == {"quantizer.codebook_size"}


def test_the_rows_of_even_usage_differ_in_rates_and_temperature_alone() -> None:
    rates, soft = {"optimizer.lr", "optimizer.codebook_lr"}, {"quantizer.entropy_temperature"}
    assert _differences("even-ibq", "ibq-16384") == rates | soft
    assert _differences("even-not-soft", "ibq-16384") == _differences("even-vq", "vq-16384") == rates
    assert _differences("even-one-rate", "even-ibq") == {"optimizer.codebook_lr"}
    assert _differences("even-only-soft", "ibq-16384") == soft
    assert _differences("even-262144", "short-262144") == rates | soft


def test_each_combination_of_the_terms_is_there_once() -> None:
    terms = ("quantizer.straight_through", "quantizer.double_quantization", "loss.entropy_weight")
    names = ["ibq-1024", *(c.name for c in CONFIGURATIONS if c.group == "terms")]
    assert len({tuple(bool(_config(name)[term]) for term in terms) for name in names}) == len(names) == 8
    for name in names[1:]:
        assert _differences("ibq-1024", name) <= set(terms)


def test_all_with_one_seed_come_before_the_next_seed_and_the_long_ones_last() -> None:
    groups = [(t.configuration.group == "long", t.seed) for t in trials()]
    assert groups == sorted(groups)
    assert len(groups) == len(CONFIGURATIONS) * len(SEEDS)
    chosen = trials(["vq-1024", "ibq-1024"], seeds=[7])
    assert [t.name for t in chosen] == ["ibq-1024/seed-7", "vq-1024/seed-7"]


def test_a_wrong_name_is_answered_with_the_right_ones() -> None:
    with pytest.raises(UserError, match=r"no configuration named ibq-1025: there are ibq-1024"):
        trials(["ibq-1025"])
