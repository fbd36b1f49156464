"""docs/troubleshooting.md, walked: a fault is planted in a small run, the words that the program prints lead to a
section of the page, and the commands of that section mend the run. The test types what it reads there.

The tests that plant hangs, dead workers, damaged checkpoints and collapses look their words up in the page themselves.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from ibq_scale.checkpoint.reading import newest_or_this
from ibq_scale.cli.main import main
from ibq_scale.data.prepare import prepare_images
from ibq_scale.pretrained.loading import load_tokenizer
from tests.docs.pages import blocks, commands, flat, section, setting
from tests.faults import FaultProxy, stalled
from tests.nursery import Forked
from tests.nursery import commands as start_commands
from tests.samples import damaged_copy
from tests.train.runs import lines, words

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
# What the page's commands name.
PLACES = {"run": "runs/tok", "step": "12345", "checkpoint": "step-00012000", "data": "s3://bucket/imagenet"}


def here(word: str, **places: object) -> str:
    """A word of the page for this run: of PLACES, with these instead."""
    for name, place in places.items():
        word = word.replace(PLACES[name], str(place))
    return word


def command(begin: Sequence[str], found: str, **places: object) -> list[str]:
    """The section's command that begins so, for this run."""
    (typed,) = [typed for typed in commands(found) if typed[: len(begin)] == list(begin)]
    return [here(word, **places) for word in typed]


class Runs:
    """Small runs on one data set, each from its command line."""

    def __init__(self, data: str) -> None:
        self._data = data

    def start(self, run: Path, *more: str, ranks: int = 1, data: str | None = None) -> list[Forked]:
        """The command with these words behind it."""
        common = ("data.workers=0", f"train.micro_batch={8 // ranks}")
        return start_commands(words(data or self._data, run, *common, *more), ranks)

    def ends(self, code: int, run: Path, *more: str, data: str | None = None) -> str:
        """All that the command said, which ends with this exit code."""
        (process,) = self.start(run, *more, data=data)
        said = "".join(process.communicate())
        assert process.returncode == code, said
        return said


@pytest.fixture(scope="module")
def runs(dataset: str) -> Runs:
    return Runs(dataset)


@pytest.fixture(scope="module")
def healthy(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, with checkpoints of the second and the fourth. Read only."""
    run = tmp_path_factory.mktemp("healthy")
    runs.ends(0, run, "train.steps=4", "train.checkpoint_every=2")
    return run


@pytest.fixture
def run(healthy: Path, tmp_path: Path) -> Path:
    """A copy of `healthy`, to be harmed."""
    return shutil.copytree(healthy, tmp_path / "tok")


def test_a_start_that_is_refused(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "tok"
    assert main(words("x", run, "optimizer.learning_rate=1e-4")) == 2
    said = capsys.readouterr().err
    section("unknown key", said)
    (right,) = re.findall("did you mean '(.+?)'", said)
    uneven = ("train.steps=1", f"{right}=1e-4", "train.micro_batch=3")
    said = runs.ends(2, run, *uneven)
    found = section("is no multiple of micro_batch × ranks", said)
    assert "names a `train.micro_batch` that fits" in flat(found)
    (fitting,) = re.findall(r"(train\.micro_batch=\d+) would fit", said)
    assert "done: 1 steps" in runs.ends(0, run, *uneven, fitting)


def test_a_loss_that_became_nan(runs: Runs, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fifth step spoils the weights, and is saved with them; those after it are skipped, and not saved."""
    diverging = ("train.steps=12", "train.checkpoint_every=1", "optimizer.lr=1e20", "train.skipped_steps=2")
    said = runs.ends(1, run, *diverging)
    assert [line["skipped"] for line in lines(run)] == [0.0] * 5 + [1.0] * 2
    found = section("TooManySkippedStepsError", said)
    assert "OVERFLOW! Skipping step" in flat(found), "what DeepSpeed prints under ZeRO"
    assert "`skipped` in `metrics.jsonl`" in flat(found)
    assert "step 7 was skipped on all ranks" in (run / "logs/rank-00000.log").read_text()
    assert main(command(["data", "trace"], found, run=run, step=7)) == 0
    assert capsys.readouterr().out.count(".jpg") > 0

    lower = setting("optimizer.lr", found)
    assert "It ends again at once, whatever the rate" in flat(found)
    assert "TooManySkippedStepsError" in runs.ends(1, run, *diverging, lower)
    newest = newest_or_this(run).path
    assert newest.name == "step-00000005"
    (line,) = [line for block in blocks(found, "bash") for line in block.splitlines() if line.startswith("mv ")]
    subprocess.run(shlex.split(here(line, run=run, checkpoint=newest.name)), check=True)
    assert f"resuming from {run}/checkpoints/step-00000004" in runs.ends(0, run, *diverging, lower, "train.steps=8")
    assert [line["skipped"] for line in lines(run)] == [0.0] * 8


def test_other_data_or_another_order_is_a_new_run(runs: Runs, run: Path) -> None:
    said = runs.ends(2, run, "train.steps=6", "train.seed=1")
    found = section("the order of samples depends on it", said)
    begun = command(["train", "tokenizer"], found, run=run)
    given = [word for word in begun if word.startswith(("init=", "out="))]
    assert given == [f"init={run}", f"out={run}-2"]
    still = ("train.steps=1", "train.seed=1", "optimizer.lr=1e-12")
    assert "starting" in runs.ends(0, run, *still, *given)
    before, begun_with = load_tokenizer(run), load_tokenizer(Path(f"{run}-2"))
    torch.testing.assert_close(begun_with.codebook_KD, before.codebook_KD)
    torch.testing.assert_close(begun_with.autoencoder.state_dict(), before.autoencoder.state_dict())


def test_memory_that_does_not_suffice(capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*more: str) -> str:
        assert main(["plan", "ar/tiny", *more]) == 0
        return capsys.readouterr().out

    small = ("--memory", "2.15")
    said = plan(*small)
    found = section("DOES NOT FIT", said)
    assert found == section("would fit with", said)
    assert command(["plan"], found)
    assert "the cheapest first" in flat(found)
    switch = said.partition("would fit with ")[2].partition(":")[0]
    assert "  fits: " in plan(*small, *switch.split())


def test_damaged_pictures(runs: Runs, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More than the budget have been saved as counted when it is looked at."""
    data, run = damaged_copy(dataset, tmp_path / "data", [0, 1, 2]), tmp_path / "tok"
    strict = ("train.steps=3", "train.checkpoint_every=2", "train.log_every=3", "data.bad_samples=0")
    said = runs.ends(1, run, *strict, data=str(data))
    found = section("damaged samples so far", said)
    assert found == section("a sample was replaced", (run / "logs/rank-00000.log").read_text())
    verify = command(["data", "verify"], found, data=data)
    assert main(verify) == 1
    (shard,) = re.findall(r"(\S+\.tar): content changed", capsys.readouterr().out)
    shutil.copy(Path(dataset) / shard, data)
    assert main(verify) == 0
    assert "damaged samples so far" in runs.ends(1, run, *strict, data=str(data))
    said = runs.ends(0, run, *strict, setting("data.bad_samples", found), data=str(data))
    assert "resuming from" in said


def test_a_slow_store(
    runs: Runs, pictures: Path, new_prefix: Callable[[], str], proxy: FaultProxy, tmp_path: Path
) -> None:
    url, run = new_prefix(), tmp_path / "tok"
    prepare_images(pictures, url, shard_bytes=8_000)
    # Longer than a step on a loaded machine.
    proxy.inject(stalled(3.0), r"\.tar$")
    uncached = ("train.steps=3", "data.cache_dir=null")
    said = runs.ends(0, run, *uncached, data=url)
    # The first step takes its time for other things.
    waits = [line["data_wait"] for line in lines(run)[1:]]
    assert min(waits) > 0.3, waits
    found = section("data_wait", " ".join(lines(run)[-1]))
    assert re.search(r"wait [3-9]\d %", said)
    cached = setting("data.cache_dir", found).replace("/local", str(tmp_path))
    before = len(proxy.log)
    runs.ends(0, run, *uncached, cached, "train.steps=9", data=url)
    # 24 pictures are three steps: two epochs ask the slow store for each shard once.
    fetched = [path for path in proxy.log[before:] if ".tar" in path]
    assert fetched, proxy.log
    assert len(fetched) == len(set(fetched)), fetched
