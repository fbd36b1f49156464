"""Numbers of the command line."""

from __future__ import annotations

import argparse
import math


def finite(text: str) -> float:
    """A finite number: what is computed with ``nan`` is ``nan`` too, and often without a word."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is no finite number")
    return value
