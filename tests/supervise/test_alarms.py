"""Rules that look at a run's lines: told once, silent in health."""

from __future__ import annotations

import math

from ibq_scale.supervise.alarms import LEAST, Above, Alarms, Drop, Spike
from tests.docs.pages import section, setting


def test_a_spike_is_told_once_and_again_after_it_has_passed() -> None:
    alarms = Alarms([Spike("loss")])
    told = [alarms.check({"loss": 2.0 + 0.05 * math.sin(i)}) for i in range(40)]
    assert told == [[]] * 40
    assert alarms.check({"loss": 3.5}) == ["loss jumped to 3.5, its median over 40 lines is 2.004"]
    assert alarms.check({"loss": 3.6}) == []
    assert alarms.check({"loss": 2.0}) == []
    assert len(alarms.check({"loss": 3.5})) == 1


def test_a_falling_loss_is_no_spike_and_the_first_lines_are_no_measure() -> None:
    alarms = Alarms([Spike("loss")])
    assert [a for i in range(60) for a in alarms.check({"loss": 10.0 * 0.9**i})] == []
    assert [a for i in range(LEAST) for a in Alarms([Spike("loss")]).check({"loss": 10.0**i})] == []


def test_a_codebook_that_collapses_is_told() -> None:
    alarms = Alarms([Drop("usage")])
    usage = [0.2 + 0.05 * i for i in range(16)] + [0.9] * 5 + [0.8, 0.65, 0.3, 0.2]
    told = [(i, a) for i, value in enumerate(usage) for a in alarms.check({"usage": value})]
    assert told == [(23, "usage fell to 0.3 from 0.95")] or told == [(22, "usage fell to 0.65 from 0.95")]
    found = section("usage fell to", told[0][1])
    assert setting("quantizer.kind", found.partition("Take ")[2]) == "quantizer.kind=ibq"
    assert setting("quantizer.revive_after", found).partition("=")[2].isdigit()


def test_a_limit_has_to_be_passed_for_long_and_absent_metrics_are_nothing() -> None:
    alarms = Alarms([Above("discriminator_accuracy", 0.98, "it has won")])
    assert alarms.check({"loss": 1.0}) == []
    high = [alarms.check({"discriminator_accuracy": 0.99}) for _ in range(30)]
    assert [a for line in high[:LEAST] for a in line] == []
    assert high[LEAST] == [f"discriminator_accuracy has been above 0.98 for {LEAST + 1} lines: it has won"]
    assert [a for line in high[LEAST + 1 :] for a in line] == []
    alarms.check({"discriminator_accuracy": 0.5})
    assert alarms.check({"discriminator_accuracy": 0.99}) == []
