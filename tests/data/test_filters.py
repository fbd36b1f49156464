"""Conditions: read strictly, and false for what is not there."""

from __future__ import annotations

import pytest

from ibq_scale.data.filters import all_hold, check_columns, parse_conditions, picture_holds
from ibq_scale.errors import UserError


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("score>=5.5", True),
        ("score > 5.5", False),
        ("score<6", True),
        ("score==5.5", True),
        ("text<7", True),
        ("language==en", True),
        ("language=='en'", True),
        ("language!=en", False),
        ("deep.er.score==3", True),
        ("dotted.name==1", True),
        ("null!=1", False),
        ("absent!=1", False),
        ("language>1", False),
    ],
)
def test_conditions_on_columns(text: str, holds: bool) -> None:
    columns = {
        "score": 5.5,
        "text": "6.5",
        "language": "en",
        "null": None,
        "deep": {"er": {"score": 3}},
        "dotted.name": 1,
    }
    assert all_hold(parse_conditions([text]), columns) is holds
    # A condition on a column says nothing about the picture.
    assert picture_holds(parse_conditions([text]), 1, 1)


def test_conditions_on_the_picture() -> None:
    conditions = parse_conditions(["width>=256", "height>=256", "aspect<=2"])
    assert picture_holds(conditions, 512, 256)
    assert not picture_holds(conditions, 513, 256)
    assert not picture_holds(conditions, 300, 255)
    assert all_hold(conditions, {"width": 1})


@pytest.mark.parametrize("text", ["", "score", "score>=", ">=5", "score=5", "score=>5", "language>=en", "a>1>2"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_conditions([text])


def test_a_column_that_is_null_in_the_first_sample_is_there() -> None:
    check_columns(parse_conditions(["score>1", "a.b>1", "width>1"]), {"score": None, "a": {"b": None}})
    with pytest.raises(UserError, match=r"no column 'a\.c'"):
        check_columns(parse_conditions(["a.c>1"]), {"a": {"b": 1}})
