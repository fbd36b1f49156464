"""Results of evaluations as files, for `report` and `evaluate compare`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ibq_scale.checkpoint.files import write_whole
from ibq_scale.errors import UserError


def write_result(path: Path, result: Any) -> None:
    """Writes a result (a dataclass) as JSON, what ``--json`` prints. UserError where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(result), indent=1) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None
