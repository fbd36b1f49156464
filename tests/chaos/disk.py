"""What a run directory holds, and whether that is what must be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ibq_scale.checkpoint.reading import Checkpoint, verify, whole_checkpoints
from ibq_scale.config.layers import load_resolved
from ibq_scale.data.sets import DataSets, open_sets
from tests.chaos.scenario import KEPT

# Of a line of metrics.jsonl: what depends on the clock or on how a run was cut, and not on what it computes.
OF_THE_CLOCK = ("time", "step_s", "samples_per_s", "data_wait", "save_stall_s", "alarms", "memory_bytes")
WORD = 2**64


def newest_name(folder: Path) -> str:
    """The highest ``step-…`` there, whole or not; empty where there is none."""
    return max((p.name for p in folder.glob("step-*")), default="")


def latest(folder: Path) -> str:
    """What the pointer names; empty where there is none."""
    try:
        return (folder / "latest").read_text().strip()
    except FileNotFoundError:
        return ""


def last_step(run: Path) -> int:
    """The last whole line of metrics.jsonl; 0 where there is none."""
    try:
        lines = (run / "metrics.jsonl").read_bytes()[-8192:].splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        if line.endswith(b"\n") and line.startswith(b'{"step": '):
            return int(json.loads(line)["step"])
    return 0


class Samples:
    """Which samples a run must have seen, by a computation of its own: positions through the order, one by one."""

    def __init__(self, run: Path) -> None:
        self._config = load_resolved(run / "config.yaml")
        kind: Any = "images" if self._config.task == "tokenizer" else "codes"
        data = self._config.data.model_copy(update={"cache_dir": None})
        self._sets: DataSets = open_sets(data, kind)
        self._order = self._sets.order(self._config.train.seed)

    def faults(self, checkpoint: Checkpoint) -> list[str]:
        """Where the sums over the samples that ranks really got (epochs.json) are not those of the positions before
        the checkpoint's, each once."""
        said = json.loads((checkpoint.path / "epochs.json").read_text())
        each = self._sets.samples
        epoch, begun = divmod(checkpoint.samples, each)
        places = [self._order.locate(p) for p in range(epoch * each, epoch * each + begun)]
        if len({(p.shard, p.row) for p in places}) != begun:
            return [f"epoch {epoch}: the order itself names a sample twice"]
        total = sum(self._hash(place.shard, place.row) for place in places) % WORD
        expected = [{"set": 0, "epoch": epoch, "sum": total, "samples": begun}] if begun else []
        if said != {"checked": [epoch], "begun": expected}:
            return [f"{checkpoint.path.name}: the samples seen are {said}, not {epoch} epochs and {expected}"]
        return []

    def _hash(self, shard: int, row: int) -> int:
        """splitmix64 of (shard, row), in whole numbers of Python."""
        x = int(self._sets.parts[0].manifest.shards[shard].sha256[:16], 16) + (row + 1) * 0x9E3779B97F4A7C15
        x %= WORD
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
        return x ^ (x >> 31)


class Inspector:
    """Looks at a run directory after each kill; knows the newest checkpoint that was ever there."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.newest = 0
        self._samples: Samples | None = None

    def look(self) -> list[str]:
        """The faults; none when the directory is what a crash may leave."""
        folder = self.run / "checkpoints"
        faults = []
        whole = whole_checkpoints(folder)
        for checkpoint in whole:
            faults += [f"{checkpoint.path.name}: {fault}" for fault in verify(checkpoint)]
            faults += self._of_samples(checkpoint)
        newest = whole[-1].step if whole else 0
        if newest < self.newest:
            faults.append(f"the newest whole checkpoint is of step {newest}, and there was one of step {self.newest}")
        names = [c.path.name for c in whole]
        pointer = latest(folder)
        # A kill between the first checkpoint and its pointer leaves none.
        if (pointer or len(whole) > 1) and pointer not in names:
            faults.append(f"latest names '{pointer}', the whole ones are {names}")
        # One more stands between a new one's rename and the removal of the oldest.
        if len(whole) > KEPT + 2:
            faults.append(f"{len(whole)} checkpoints were kept: {names}")
        self.newest = max(newest, self.newest)
        return faults

    def _of_samples(self, checkpoint: Checkpoint) -> list[str]:
        if self._samples is None:
            self._samples = Samples(self.run)
        return self._samples.faults(checkpoint)


def difference(reference: Path, run: Path) -> list[str]:
    """Where a run that has ended is not the reference: its last checkpoint's every tensor, its log, what it left."""
    one, two = whole_checkpoints(reference / "checkpoints")[-1], whole_checkpoints(run / "checkpoints")[-1]
    faults = []
    if set(one.manifest["files"]) != set(two.manifest["files"]):
        return [f"other files: {sorted(set(one.manifest['files']) ^ set(two.manifest['files']))}"]
    for name in one.manifest["files"]:
        if name.endswith(".safetensors"):
            faults += [f"{name}: {fault}" for fault in _tensors_differ(one.path / name, two.path / name)]
        elif (one.path / name).read_bytes() != (two.path / name).read_bytes():
            faults.append(f"{name} differs")
    for fact in ("step", "samples", "data_hash", "world_size"):
        if one.manifest[fact] != two.manifest[fact]:
            faults.append(f"manifest: {fact} is {two.manifest[fact]}, not {one.manifest[fact]}")
    return faults + _logs_differ(reference, run) + _left_over(run, two)


def tensors_compared(reference: Path) -> int:
    """How many tensors `difference` compares."""
    files = whole_checkpoints(reference / "checkpoints")[-1].path.rglob("*.safetensors")
    return sum(len(_read(path)[0]) for path in files)


def _tensors_differ(one: Path, two: Path) -> list[str]:
    (tensors_one, words_one), (tensors_two, words_two) = _read(one), _read(two)
    if words_one != words_two or tensors_one.keys() != tensors_two.keys():
        return ["other names or metadata"]
    return [name for name in tensors_one if not _same_bits(tensors_one[name], tensors_two[name])]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    with safe_open(path, framework="pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118


def _logs_differ(reference: Path, run: Path) -> list[str]:
    one, two = _log(reference), _log(run)
    if [line["step"] for line in two] != [line["step"] for line in one]:
        return [f"metrics.jsonl has the steps {[line['step'] for line in two]}"]
    faults = []
    for a, b in zip(one, two, strict=True):
        names = [n for n in a | b if n not in OF_THE_CLOCK and not n.startswith("own_step") and a.get(n) != b.get(n)]
        faults += [f"step {a['step']}: {name} is {b.get(name)}, not {a.get(name)}" for name in names]
    return faults


def _log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _left_over(run: Path, newest: Checkpoint) -> list[str]:
    """A run that has ended has its checkpoints, the pointer to the newest, and nothing else."""
    folder = run / "checkpoints"
    expected = {"latest", *[c.path.name for c in whole_checkpoints(folder)[-KEPT:]]}
    faults = [f"left in checkpoints/: {name}" for name in sorted({p.name for p in folder.iterdir()} - expected)]
    if latest(folder) != newest.path.name:
        faults.append(f"latest names {latest(folder)}, not {newest.path.name}")
    return faults
