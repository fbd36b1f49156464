"""Checks of a tokenize, sample or evaluate job before submission."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ibq_scale.cluster.checks import Checks, Job, Outcome, number, ranks_without_gpu, slurm_takes
from ibq_scale.cluster.room import can_hold, nearest
from ibq_scale.errors import UserError


@dataclass(frozen=True)
class CommandJob(Job):
    """A command's job, with the command's own arguments, as parsed."""

    name: str
    args: argparse.Namespace

    def given(self, name: str) -> str | None:
        """An argument of the command. None if the command has no such argument."""
        value = getattr(self.args, name, None)
        return None if value is None else str(value)


def _ranks(job: CommandJob) -> Outcome:
    nodes, ranks = number(job.script, "nodes"), number(job.script, "ntasks-per-node")
    array = job.script.option("array")
    each = f"in each of the jobs {array}" if array else "in one job"
    return ranks_without_gpu(job.script) or ("ok", f"{job.name}: {ranks} ranks on {nodes} nodes, {each}")


def _model(job: CommandJob) -> Outcome | None:
    from ibq_scale.pretrained.loading import kind_of

    kinds = {"checkpoint": "ar" if job.name == "sample" else "tokenizer", "tokenizer": "tokenizer"}
    given = [(path, kind) for name, kind in kinds.items() if (path := job.given(name)) is not None]
    for path, kind in given:
        if (found := kind_of(path)) != kind:
            return "FAIL", f"{path} holds a model of kind {found}, {kind} is needed"
    return ("ok", ", ".join(f"{path} ({kind})" for path, kind in given)) if given else None


def _data(job: CommandJob) -> Outcome | None:
    url = job.given("data")
    if url is None or (job.name == "evaluate" and job.given("checkpoint") is None):
        return None
    from ibq_scale.data.manifest import load_manifest
    from ibq_scale.data.store import open_store

    manifest = load_manifest(open_store(url), "images")
    return "ok", f"{manifest.samples:,} images in {url}"


def _images(job: CommandJob) -> Outcome | None:
    """Pictures and statistics for `evaluate`: files, folders or prepared data."""
    given = [text for name in ("samples", "reference") if (text := job.given(name)) is not None]
    absent = [text for text in given if "://" not in text and not Path(text).exists()]
    if absent:
        return "FAIL", f"{absent[0]} does not exist"
    return ("ok", f"{' and '.join(given)}; must be visible on all nodes") if given else None


def _output(job: CommandJob) -> Outcome | None:
    to = job.given("to")
    if to is None:
        return None
    from ibq_scale.data.store import open_store

    if "://" in to:
        # The store answers. Write access is not tried.
        open_store(to).exists("manifest.json")
        return "ok", f"{to} answers"
    folder = nearest(Path(to))
    if can_hold(folder, 1) is False:
        raise UserError(f"{folder} has no room: make some, or give another --to")
    return "ok", f"{to} can be written"


CHECKS: Checks[CommandJob] = (
    ("ranks", (), _ranks),
    ("model", (), _model),
    ("data", (), _data),
    ("images", (), _images),
    ("output", (), _output),
    ("slurm", (), slurm_takes),
)
