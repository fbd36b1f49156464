"""Sets a run back to an earlier checkpoint. Later ones are moved aside, here and in the mirror, and never removed."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path

from ibq_scale.checkpoint.mirror import Mirror
from ibq_scale.checkpoint.reading import MANIFEST, STEP_NAME, verify, whole_checkpoints
from ibq_scale.checkpoint.saving import point
from ibq_scale.config.layers import load_resolved
from ibq_scale.errors import UserError
from ibq_scale.supervise.metrics import METRICS, keep_until
from ibq_scale.supervise.run_lock import RunLock

ASIDE = "rolled-back"


def rollback(run_dir: Path, step: int) -> list[str]:
    """Makes the checkpoint of `step` the newest of the run. Returns lines for the user.

    Later checkpoints, whole or not, and the whole metrics.jsonl go to RUN/rolled-back/TIME. Later copies in the mirror
    lose their manifest and no longer count. UserError if the run is alive, or has no whole checkpoint of this step.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    with ExitStack() as stack:
        stack.callback(RunLock(run_dir).release)
        mirror = Mirror.of(load_resolved(run_dir / "config.yaml").train.mirror)
        copies = [] if mirror is None else mirror.whole(mirror.copies())
        folder, name = run_dir / "checkpoints", f"step-{step:08d}"
        here = {checkpoint.step: checkpoint for checkpoint in whole_checkpoints(folder)}
        known = sorted({*here, *(copy.step for copy in copies)})
        if step not in known:
            raise UserError(
                f"{run_dir} has no whole checkpoint of step {step}. It has: {', '.join(map(str, known)) or 'none'}"
            )
        if step in here and (faults := verify(here[step])):
            raise UserError(f"{here[step].path} is damaged: {'; '.join(faults)}")
        aside = run_dir / ASIDE / time.strftime("%Y%m%dT%H%M%S")
        aside.mkdir(parents=True, exist_ok=True)
        said = [] if mirror is None else _unseal(mirror, name, aside)
        for path in sorted(folder.glob("step-*"), reverse=True):
            if STEP_NAME.fullmatch(path.name) and path.name > name:
                path.rename(aside / path.name)
                said.append(f"{path} → {aside / path.name}")
        if step in here:
            point(folder, name)
        else:
            (folder / "latest").unlink(missing_ok=True)
            said.append(f"step {step} is in the mirror: the next start fetches it")
        if (run_dir / METRICS).is_file():
            shutil.copy2(run_dir / METRICS, aside / METRICS)
            keep_until(run_dir / METRICS, step)
    return [*said, f"{run_dir}: the next start goes on from step {step}"]


def _unseal(mirror: Mirror, newest: str, aside: Path) -> list[str]:
    """Keeps the manifests of the mirror's copies after `newest` in `aside`, and takes them out of the mirror."""
    said = []
    for name in reversed(mirror.copies().sealed):
        if name > newest:
            (aside / f"mirror-{name}-{MANIFEST}").write_bytes(mirror.store.read(f"{name}/{MANIFEST}"))
            mirror.unseal(name)
            said.append(
                f"{mirror.store.url}/{name} no longer counts (its manifest is in {aside}). The run removes its files "
                f"when it has passed step {int(name.removeprefix('step-'))}: copy them before, if you need them"
            )
    return said
