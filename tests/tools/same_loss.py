"""Whether two revisions train the same: ``python -m tests.tools.same_loss OLD [NEW]`` (default: the files as they are).

Both train the small tokenizer and the small transformer of the tests on the same data, on two ranks, each from its own
checkout. Compared are all logged values that are not times, and every tensor of the models at the end, bit by bit. The
exit code is 0 where all are equal, 1 where not, 2 where a revision cannot be had or does not train.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.samples import SMALL_AR, write_codes, write_pictures
from tests.train.runs import SMALL

ROOT = Path(__file__).resolve().parents[2]
OF_TIME = ("time", "step_s", "samples_per_s", "data_wait", "save_stall_s", "own_step_s", "memory")
SHORT = ("train.log_every=1", "data.workers=0", "data.lanes=3", "data.window=2", "train.keep_checkpoints=1")
RANKS = ("--ranks", "2")


@dataclass(frozen=True)
class Outcome:
    """What a training left: logged values by step, and the model's tensors."""

    lines: list[dict[str, float]]
    tensors: dict[str, torch.Tensor]


class CannotTrainError(RuntimeError):
    """A revision's training failed."""


def differences(old: Outcome, new: Outcome) -> list[str]:
    """One line for each value that differs, at its first step, and one for each tensor; none where all are equal."""
    said = []
    if len(old.lines) != len(new.lines):
        said.append(f"{len(old.lines)} steps were logged before, {len(new.lines)} now")
    names = sorted({name for line in (*old.lines, *new.lines) for name in line})
    for name in names:
        for a, b in zip(old.lines, new.lines, strict=False):
            if a.get(name) != b.get(name):
                said.append(f"{name}: {a.get(name)} before, {b.get(name)} now, from step {int(a['step'])} on")
                break
    for name in sorted(old.tensors.keys() | new.tensors.keys()):
        before, now = old.tensors.get(name), new.tensors.get(name)
        if before is None or now is None:
            said.append(f"{name}: only {'now' if before is None else 'before'}")
        elif before.shape != now.shape or before.dtype != now.dtype:
            said.append(f"{name}: {tuple(before.shape)} {before.dtype} before, {tuple(now.shape)} {now.dtype} now")
        elif not torch.equal(before, now):
            most = float((before.double() - now.double()).abs().max())
            said.append(f"{name}: differs by up to {most:.3g}")
    return said


@contextmanager
def checkout(revision: str | None) -> Iterator[Path]:
    """A revision's files in a folder of their own; the files as they are for None."""
    if revision is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="same-loss-") as folder:
        archive = subprocess.run(["git", "-C", ROOT, "archive", revision], capture_output=True, check=False)
        if archive.returncode:
            raise CannotTrainError(archive.stderr.decode().strip())
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def train(source: Path, stage: str, data: Path, out: Path, steps: int) -> Outcome:
    """Trains one stage by the code in `source`. CannotTrainError with its last words where that fails."""
    sizes = SMALL if stage == "tokenizer" else (*SMALL_AR, "train.global_batch=8", "train.micro_batch=4")
    words = ["train", stage, "tiny", f"data.train={data}", f"out={out}", f"train.steps={steps}", *sizes, *SHORT, *RANKS]
    _run(source, words)
    _run(source, ["checkpoint", "export", str(out), "--to", str(out / "exported")])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if not name.startswith(OF_TIME)} for line in lines]
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted((out / "exported").glob("*.safetensors")):
        tensors |= load_file(path)
    return Outcome(kept, tensors)


def _run(source: Path, words: Sequence[str]) -> None:
    env = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ibq_scale", *words]
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-3:]
        raise CannotTrainError(f"'ibq-scale {' '.join(words[:3])} …' in {source} failed: {' '.join(last)}")


def write_data(folder: Path) -> dict[str, Path]:
    """What both stages train on."""
    from ibq_scale.data.prepare import prepare_images

    write_pictures(folder / "pictures")
    prepare_images(folder / "pictures", str(folder / "images"), shard_bytes=8_000)
    write_codes(folder / "codes")
    return {"tokenizer": folder / "images", "ar": folder / "codes"}


def compare(old: str | None, new: str | None, steps: int) -> dict[str, list[str]]:
    """What differs, by stage."""
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="same-loss-") as folder, checkout(old) as a, checkout(new) as b:
        for stage, data in write_data(Path(folder)).items():
            outcomes = [
                train(source, stage, data, Path(folder) / stage / side, steps)
                for side, source in (("old", a), ("new", b))
            ]
            found[stage] = differences(*outcomes)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.same_loss", description=__doc__.splitlines()[0])
    parser.add_argument("old", metavar="OLD", help="a commit, branch or tag")
    parser.add_argument("new", metavar="NEW", nargs="?", help="another (default: the files as they are)")
    parser.add_argument("--steps", type=int, default=6, metavar="N")
    args = parser.parse_args(argv)
    try:
        found = compare(args.old, args.new, args.steps)
    except CannotTrainError as e:
        print(e, file=sys.stderr)
        return 2
    for stage, said in found.items():
        print(f"{stage}: {'equal, bit by bit' if not said else f'{len(said)} values and tensors differ'}")
        for line in said[:20]:
            print(f"  {line}")
        if len(said) > 20:
            print(f"  … and {len(said) - 20} more")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
