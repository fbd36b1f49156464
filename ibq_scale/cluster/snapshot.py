"""A copy of code and config at submission, in RUN/submitted/NNN. Later edits do not reach the job.

RUN is the run directory, or the output folder of another command.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import ibq_scale
from ibq_scale.commit import COMMIT, git
from ibq_scale.config.layers import to_yaml
from ibq_scale.config.run import AnyRun
from ibq_scale.documents import read_json
from ibq_scale.errors import UserError

FOLDER = "submitted"
# The id of a job, or of a task of an array.
JOB_ID = re.compile(r"\d+(_\d+)?")
CODE, CONFIG, SCRIPT, RECORD = "code", "config.yaml", "job.sbatch", "submission.json"
# The parts of a checkout for a run. Tests and documents are left out.
PARTS = ("ibq_scale", "deepspeed_configs", "slurm", "pyproject.toml")


@dataclass(frozen=True)
class Source:
    """The origin of the running package. `root`: its checkout. None for an installed package."""

    version: str
    root: Path | None = None
    commit: str | None = None
    changed: bool = False

    @staticmethod
    def here() -> Source:
        root = Path(ibq_scale.__file__).resolve().parents[1]
        if root.name in ("site-packages", "dist-packages"):
            return Source(ibq_scale.__version__)
        commit = git(root, "rev-parse", "HEAD")
        changed = bool(commit and git(root, "status", "--porcelain", "--", *PARTS))
        return Source(ibq_scale.__version__, root, commit.strip() if commit else None, changed)

    def __str__(self) -> str:
        if self.root is None:
            return f"ibq-scale {self.version}, as installed (no copy: an upgrade before the job starts changes it)"
        commit = f"{self.commit[:12]}{' with changes' if self.changed else ''}" if self.commit else self.version
        return f"the code of {self.root} ({commit})"


@dataclass(frozen=True)
class Snapshot:
    """RUN/submitted/NNN. `pythonpath`: the job's import folder, None for an installed package."""

    folder: Path
    source: Source

    @property
    def config(self) -> Path:
        return self.folder / CONFIG

    @property
    def script(self) -> Path:
        return self.folder / SCRIPT

    @property
    def pythonpath(self) -> Path | None:
        return None if self.source.root is None else self.folder / CODE

    def forget(self) -> None:
        """Removes the snapshot of a failed submission."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def record(self, **values: object) -> None:
        """Records the submission: `jobs` (ids) and facts for a reader."""
        source = asdict(self.source) | {"root": str(self.source.root) if self.source.root else None}
        (self.folder / RECORD).write_text(json.dumps(values | {"source": source}, indent=1) + "\n", encoding="utf-8")


def next_folder(run_dir: Path) -> Path:
    taken = [int(p.name) for p in (run_dir / FOLDER).glob("*") if p.name.isdigit()]
    return run_dir / FOLDER / f"{max(taken, default=0) + 1:03d}"


def take(folder: Path, config: AnyRun | None) -> Snapshot:
    """Copies the code and writes the config, if any. UserError if that fails."""
    snapshot = Snapshot(folder, Source.here())
    try:
        folder.mkdir(parents=True)
        if snapshot.source.root is not None:
            for name in _files(snapshot.source.root):
                (folder / CODE / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(snapshot.source.root / name, folder / CODE / name)
            if snapshot.source.commit is not None:
                changes = "+changes" if snapshot.source.changed else ""
                (folder / CODE / COMMIT).write_text(f"{snapshot.source.commit}{changes}\n", encoding="utf-8")
        if config is not None:
            (folder.parents[1] / "logs").mkdir(exist_ok=True)
            snapshot.config.write_text(to_yaml(_with_own_json(config, folder)), encoding="utf-8")
    except FileExistsError:
        raise UserError(f"{folder} has just been made by another submission: run this again") from None
    except OSError as e:
        snapshot.forget()
        raise UserError(f"cannot write {folder} ({e.strerror}): give another out=…, or make room") from None
    return snapshot


def submitted_jobs(run_dir: Path) -> list[str]:
    """Ids of all jobs submitted for this run, oldest first."""
    return [job for chain in _chains(run_dir) for job in chain]


def chained_after(run_dir: Path, job: str) -> tuple[str, ...]:
    """Later jobs of the same chain."""
    return next((chain[chain.index(job) + 1 :] for chain in _chains(run_dir) if job in chain), ())


def _chains(run_dir: Path) -> Iterator[tuple[str, ...]]:
    for path in sorted((run_dir / FOLDER).glob(f"*/{RECORD}")):
        try:
            jobs = read_json(path)["jobs"]
            # The ids become arguments of scancel.
            yield tuple(job for job in jobs if isinstance(job, str) and JOB_ID.fullmatch(job))
        except (OSError, ValueError, KeyError, TypeError):
            continue


def _with_own_json(config: AnyRun, folder: Path) -> AnyRun:
    """Copies the user's own DeepSpeed JSON into the snapshot."""
    if not config.deepspeed.config.endswith(".json"):
        return config
    copy = folder / "deepspeed.json"
    shutil.copyfile(config.deepspeed.config, copy)
    return config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"config": str(copy)})})


def _files(root: Path) -> list[str]:
    """Paths below `root`: tracked files, and untracked files not ignored. Without git, all files."""
    listed = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS)
    if listed:
        return [name for name in dict.fromkeys(listed.split("\0")) if name and (root / name).is_file()]
    parts = [root / part for part in PARTS]
    found = [p for part in parts for p in ([part] if part.is_file() else part.rglob("*"))]
    return [str(p.relative_to(root)) for p in found if p.is_file() and "__pycache__" not in p.parts]
