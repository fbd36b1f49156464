"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(name: str, what: str) -> Path:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"{what} not found: this test reads {name}/ in a folder 'shared' beside the checkout")
    return path


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Numbers of the published code, kept outside the repository."""
    return _shared("parity", "the published code's numbers are")


@pytest.fixture(scope="session")
def imagenet_mini_dir() -> Path:
    """800 photographs in ImageFolder layout, kept outside the repository (research use only)."""
    return _shared("data/imagenet-mini", "the 800 photographs are")
