"""How a run lies on its ranks."""

from __future__ import annotations

import pytest

from ibq_scale.config.batch import codebook_group_size, codebook_words
from ibq_scale.config.layers import resolve
from ibq_scale.config.run import TokenizerRun
from ibq_scale.errors import UserError


def _run(*words: str) -> TokenizerRun:
    run = resolve("tokenizer/ibq-262144", ["data.train=none", *words]).config
    assert isinstance(run, TokenizerRun)
    return run


@pytest.mark.parametrize(("world", "size"), [(1, 1), (16, 16), (24, 8), (9, 1), (1024, 1024)])
def test_a_codebook_lies_on_as_many_ranks_as_divide_it(world: int, size: int) -> None:
    assert codebook_group_size(_run(), world) == size


def test_the_reason_is_told_where_not_all_ranks_share_a_codebook() -> None:
    assert codebook_words(_run(), 24) == "groups of 8 (24 ranks do not divide 262,144 codes)"
    assert codebook_words(_run(), 16) == "groups of 16"
    assert codebook_words(_run("codebook_group=4"), 16) == "groups of 4"


def test_a_group_that_was_asked_for_is_taken_or_refused() -> None:
    assert codebook_group_size(_run("codebook_group=3"), 24) == 3
    with pytest.raises(UserError, match="codebook_group=5 does not divide the 24 ranks"):
        codebook_group_size(_run("codebook_group=5"), 24)
