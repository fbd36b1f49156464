"""Codes to train transformers on."""

from __future__ import annotations

import pytest

from tests.samples import write_codes


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("codes")
    write_codes(folder)
    return str(folder)
