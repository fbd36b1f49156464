"""The page for two in the morning, walked: a fault is planted in a small run, the words that the program says lead to a
section of the page, and what that section says to type mends it. The test types what it reads there.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from ibq_scale.checkpoint.reading import newest_or_this, whole_checkpoints
from ibq_scale.cli.main import main
from ibq_scale.data.prepare import prepare_images
from ibq_scale.pretrained.loading import load_tokenizer
from tests.docs.pages import ROOT, blocks, commands, sections
from tests.faults import FaultProxy, stalled
from tests.nursery import Forked
from tests.nursery import commands as start_commands
from tests.samples import damaged_copy
from tests.train.runs import ENDLESS, data_workers, lines, wait_until, words

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
PAGE = ROOT / "docs/troubleshooting.md"
# What the page's commands name.
PLACES = {"run": "runs/tok", "step": "12345", "checkpoint": "step-00012000", "data": "s3://bucket/imagenet"}


def flat(text: str) -> str:
    """The same on one line: a phrase may be broken anywhere."""
    return " ".join(text.split())


def section(symptom: str, said: str) -> str:
    """The one section that is found by words that the program said."""
    assert symptom in said
    (found,) = [text for text in sections(PAGE) if symptom in flat(text)]
    return found


def setting(key: str, found: str) -> str:
    """``key=value``, as the section gives it."""
    match = re.search(rf"`({re.escape(key)}=[^`\s]+)`", found)
    assert match, key
    return match[1]


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
    found = section("OVERFLOW! Skipping step", said)
    assert found == section("TooManySkippedStepsError", said)
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


def test_a_codebook_that_collapses(runs: Runs, tmp_path: Path) -> None:
    large = ("quantizer.codebook_size=1024", "quantizer.kind=vq")
    said = runs.ends(0, tmp_path / "vq", *large, "train.steps=12")
    assert "ALARM" in said
    found = section("usage fell to", said)
    fell = lines(tmp_path / "vq")[-1]["usage"]
    ibq = setting("quantizer.kind", found.partition("Take ")[2])
    assert "Give another out=" in runs.ends(2, tmp_path / "vq", *large, ibq, "train.steps=12")
    (begun,) = runs.start(tmp_path / "ibq", *large, ibq, "train.steps=12")
    # Of as few steps as this run has.
    revived = setting("quantizer.revive_after", found).partition("=")[0] + "=2"
    runs.ends(0, tmp_path / "vq", *large, revived, "train.steps=16")
    assert "ALARM" not in begun.communicate()[1]
    for mended in ("ibq", "vq"):
        assert lines(tmp_path / mended)[-1]["usage"] > 2 * fell


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


def test_a_data_worker_that_was_killed(runs: Runs, run: Path) -> None:
    (process,) = runs.start(run, *ENDLESS, "data.workers=1")
    wait_until(lambda: lines(run)[-1]["step"] > 4, process)
    (worker,) = data_workers(process.pid)
    worker.kill()
    said = process.communicate()[1]
    assert process.returncode == 1
    found = section("a data worker on", said)
    assert f"a data worker on {socket.gethostname()} died" in said
    none = setting("data.workers", found)
    assert "resuming from" in runs.ends(0, run, *ENDLESS, "data.workers=1", none, "train.steps=6")


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


def test_a_rank_that_hangs(runs: Runs, run: Path) -> None:
    quick = ("train.hang_timeout=8", "train.checkpoint_every=1")
    ranks = runs.start(run, *ENDLESS, *quick, ranks=2)
    wait_until(lambda: lines(run)[-1]["step"] > 5, *ranks)
    ranks[1].send_signal(signal.SIGSTOP)
    said = ranks[0].communicate()[1]
    ranks[1].kill()
    assert ranks[0].returncode == 70
    found = section("HANG:", said)
    assert found == section("no sign of life", said)
    assert f"rank 1 on {socket.gethostname()}: no sign of life" in said
    assert "exit code 70" in flat(found)
    (stacks,) = re.findall(r"`RUN/(logs/stacks-\S+)`", found)
    assert any(path.stat().st_size for path in run.glob(stacks))
    assert "the same command goes on" in flat(found)
    stands = newest_or_this(run).step
    again = runs.start(run, *ENDLESS, *quick, f"train.steps={stands + 1}", ranks=2)
    assert [rank.wait() for rank in again] == [0, 0]
    assert f"resuming from {run}/checkpoints/step-{stands:08d}" in again[0].communicate()[1]


def test_a_damaged_checkpoint(runs: Runs, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = newest_or_this(run).path
    harmed = newest / "lecam.safetensors"
    content = bytearray(harmed.read_bytes())
    content[-1] ^= 1
    harmed.write_bytes(content)
    said = runs.ends(0, run, "train.steps=3", "train.checkpoint_every=100")
    found = section("is damaged and left out", said)
    assert f"{newest} is damaged and left out: {harmed.name}: content changed" in said
    assert f"resuming from {newest.with_name('step-00000002')}" in said
    verify = command(["checkpoint", "verify"], found, run=run)
    assert main(verify) == 1
    assert f"{newest}: {harmed.name}" in capsys.readouterr().err
    runs.ends(0, run, "train.steps=4")
    assert main(verify) == 0
    capsys.readouterr()
    assert main(command(["checkpoint", "ls"], found, run=run)) == 0
    assert [c.step for c in whole_checkpoints(run / "checkpoints")] == [3, 4]


def test_a_slow_store(
    runs: Runs, pictures: Path, new_prefix: Callable[[], str], proxy: FaultProxy, tmp_path: Path
) -> None:
    url, run = new_prefix(), tmp_path / "tok"
    prepare_images(pictures, url, shard_bytes=8_000)
    proxy.inject(stalled(0.5), r"\.tar$")
    uncached = ("train.steps=3", "data.cache_dir=null")
    said = runs.ends(0, run, *uncached, data=url)
    # The first step takes its time for other things.
    waits = [line["data_wait"] for line in lines(run)[1:]]
    assert min(waits) > 0.3, waits
    found = section("data_wait", " ".join(lines(run)[-1]))
    assert re.search(r"wait [3-9]\d %", said)
    cached = setting("data.cache_dir", found).replace("/local", str(tmp_path))
    runs.ends(0, run, *uncached, cached, "train.steps=9", data=url)
    # 24 pictures are three steps.
    waits = [line["data_wait"] for line in lines(run)]
    assert max(waits[6:]) < 0.1, waits
