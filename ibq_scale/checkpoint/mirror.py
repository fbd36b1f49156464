"""Copies of checkpoints in another place, object storage as a rule, from which a bare node can go on.

Each rank sends the files that it wrote; the manifest comes last, so a copy without one does not count there either.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ibq_scale.checkpoint.reading import MANIFEST, STEP_NAME, Checkpoint, file_sha256
from ibq_scale.data.store import open_store
from ibq_scale.errors import UserError


class Mirror:
    """The folder or ``s3://bucket/prefix`` of one run's copies, with the checkpoints' own names in it."""

    def __init__(self, url: str) -> None:
        self.store = open_store(url)

    @staticmethod
    def of(url: str | None) -> Mirror | None:
        return None if url is None else Mirror(url)

    def put(self, checkpoint: Path, names: Iterable[str]) -> None:
        """Sends files of a checkpoint. UserError where the store refuses."""
        for name in names:
            self.store.upload(checkpoint / name, f"{checkpoint.name}/{name}")

    def seal(self, checkpoint: Path) -> None:
        """Sends the manifest, when every file is there."""
        self.put(checkpoint, [MANIFEST])

    def newest(self) -> str | None:
        """The name of the newest whole copy, or None."""
        try:
            names = [path.split("/") for path in self.store.files()]
        except FileNotFoundError:
            return None
        whole = [parts[0] for parts in names if parts[1:] == [MANIFEST] and STEP_NAME.fullmatch(parts[0])]
        return max(whole, default=None)

    def manifest(self, name: str) -> Checkpoint:
        """What a copy's manifest says."""
        return Checkpoint(Path(name), json.loads(self.store.read(f"{name}/{MANIFEST}")))

    def fetch(self, copy: Checkpoint, names: Iterable[str], into: Path) -> None:
        """Brings files of a copy to `into`, each checked by its hash. UserError where one is not what was sent."""
        for name in names:
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self.store.download(f"{copy.path}/{name}", target)
            if file_sha256(target) != copy.manifest["files"][name]["sha256"]:
                raise UserError(f"{self.store.url}/{copy.path}/{name} is not what was sent (sha256 differs)")
