"""Fills docs/experiments.md: the figures beside it, and each table between its markers. The text stays."""

from __future__ import annotations

import re
from pathlib import Path

from ibq_scale.errors import UserError
from ibq_scale.experiments.figures import draw_all
from ibq_scale.experiments.results import RESULTS, load
from ibq_scale.experiments.tables import TABLES

DOCUMENT, FIGURES = "experiments.md", "figures"


def write_document(docs: Path) -> list[Path]:
    """Makes figures and tables from ``experiments.json`` in `docs`. Returns the written files.

    UserError if the results, the document or a table's markers are missing.
    """
    results = load(docs / RESULTS)
    document = docs / DOCUMENT
    if not document.is_file():
        raise UserError(f"{document} is missing: --docs must be its folder")
    text = document.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        text = _replaced(text, name, table.markdown(results), document)
    document.write_text(text, encoding="utf-8")
    written = [document]
    (docs / FIGURES).mkdir(exist_ok=True)
    for name, svg in draw_all(results).items():
        written.append(docs / FIGURES / name)
        written[-1].write_text(svg, encoding="utf-8")
    return written


def _replaced(text: str, name: str, table: str, document: Path) -> str:
    begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
    filled, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL
    )
    if count != 1:
        raise UserError(f"{document} must hold '{begin}' and '{end}' once each, around the table")
    return filled
