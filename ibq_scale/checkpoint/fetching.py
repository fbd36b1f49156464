"""Fetches a checkpoint from the mirror into an empty run directory, by all ranks together."""

from __future__ import annotations

import shutil
from pathlib import Path

from ibq_scale.checkpoint.mirror import Mirror, shares
from ibq_scale.checkpoint.reading import Checkpoint, NotWholeError
from ibq_scale.console import gigabytes, tell
from ibq_scale.distributed.agree import by_rank_0, of_all_ranks
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError


def fetch_newest(mirror: Mirror, folder: Path, world: World) -> Checkpoint | None:
    """The mirror's newest intact copy, under a hidden name in `folder`. None if the mirror has no copy.

    Collective. A damaged copy is reported and the one before it used. Files of a killed fetch are kept if their hash is
    right. UserError, on all ranks, if the store or the disk fails, or no copy is whole, since a fresh start is the
    user's decision.
    """
    copies = by_rank_0(world, mirror.copies)
    for name in reversed(copies.sealed):
        copy = by_rank_0(world, lambda name=name: _manifest(mirror, name))  # type: ignore[misc]
        partial = folder / f".partial-{name}"
        damage = [f"{name}: its manifest is damaged"] if copy is None else copies.faults(copy)
        if copy is not None and not damage:
            damage = _fetch(mirror, copy, partial, world)
            if not damage:
                return Checkpoint(partial, copy.manifest)
        if world.is_main:
            tell(f"{mirror.store.url}/{name} is damaged and left out: {'; '.join(damage)}")
            shutil.rmtree(partial, ignore_errors=True)
    if copies.sealed:
        raise UserError(
            f"{mirror.store.url}: every copy there is damaged (see above): give another train.mirror, or remove "
            f"them to start afresh"
        )
    return None


def _manifest(mirror: Mirror, name: str) -> Checkpoint | None:
    try:
        return mirror.manifest(name)
    except NotWholeError:
        return None


def _fetch(mirror: Mirror, copy: Checkpoint, partial: Path, world: World) -> list[str]:
    """Damaged files of the copy. UserError, on all ranks, if a part could not be fetched."""
    by_rank_0(world, lambda: _begin(mirror, copy, partial))
    mine = shares(copy.manifest["files"], world.size)[world.rank]
    damage: list[str] = []
    error: UserError | None = None
    try:
        damage = mirror.fetch(copy, mine, partial)
    except UserError as e:
        error = e
    except Exception as e:  # the others wait for a reply
        error = UserError(f"{partial}: {(isinstance(e, OSError) and e.strerror) or repr(e)}")
    everyone = of_all_ranks(world, (damage, error))
    errors = [fault for _, fault in everyone if fault]
    if errors:
        # Keeps its class: a store without an answer requeues the job.
        raise type(errors[0])(f"{copy.path} could not be fetched: {errors[0]}")
    return [line for lines, _ in everyone for line in lines]


def _begin(mirror: Mirror, copy: Checkpoint, partial: Path) -> None:
    """Makes the folder, with only possible files of the copy in it. UserError if that fails."""
    tell(f"{partial.parent} has no whole checkpoint: fetching {copy.path} from {mirror.store.url}")
    try:
        if partial.is_symlink():
            # A link's target must not be emptied.
            partial.unlink()
        partial.mkdir(parents=True, exist_ok=True)
        for path in sorted(partial.rglob("*"), reverse=True):
            if path.is_file() and path.relative_to(partial).as_posix() not in copy.manifest["files"]:
                path.unlink()
        missing = copy.bytes - sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        free = shutil.disk_usage(partial).free
    except OSError as e:
        raise UserError(f"cannot write {partial}: {e.strerror}") from None
    if free < missing:
        raise UserError(
            f"{partial.parent}: {copy.path} needs {gigabytes(missing)}, {gigabytes(free)} are free: make room"
        )
