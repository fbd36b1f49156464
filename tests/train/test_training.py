"""Runs from the command line, as users and Slurm start them: they finish, stop at a signal, go on, or are refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ibq_scale.checkpoint.reading import Checkpoint, newest_or_this, verify, whole_checkpoints
from ibq_scale.config.layers import resolve
from ibq_scale.errors import UserError
from ibq_scale.supervise.compatible import check_same_run
from tests import nursery
from tests.train.runs import SMALL, words

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
ALONE = ("model.dropout=0.1", "data.workers=0")


def _command(data: str, out: Path, *more: str) -> list[str]:
    return [*words(data, out, *ALONE, *more), "--ranks", "2"]


def _train(data: str, out: Path, *more: str) -> str:
    done = nursery.run(_command(data, out, *more))
    assert done.returncode == 0, done.stderr
    return done.stderr


def _losses(run: Path) -> dict[int, tuple[float, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["discriminator"], line["grad_norm"]) for line in lines}


@pytest.fixture(scope="module")
def whole(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, in one go."""
    run = tmp_path_factory.mktemp("whole")
    _train(dataset, run, "train.steps=6", "train.checkpoint_every=100")
    return run


def test_a_run_leaves_what_is_promised(whole: Path) -> None:
    assert list(_losses(whole)) == [1, 2, 3, 4, 5, 6]
    for name in ("config.yaml", "environment.json", "report.html", "logs/rank-00000.log", "logs/rank-00001.log"):
        assert (whole / name).is_file(), name
    assert list((whole / "images").glob("*.png"))
    newest = newest_or_this(whole)
    assert (newest.step, newest.samples, newest.manifest["world_size"]) == (6, 48, 2)
    parts = sorted(p.name for p in (newest.path / "codebook").iterdir())
    assert parts == ["rank-00000.safetensors", "rank-00001.safetensors"]


def test_a_killed_run_goes_on_from_its_last_checkpoint_with_the_same_samples(
    whole: Path, dataset: str, tmp_path: Path
) -> None:
    """kill -9 of the launcher: ranks and workers die with it, and nothing half-made is used."""
    more = ("train.steps=6", "train.checkpoint_every=2", "data.workers=1", f"data.cache_dir={tmp_path / 'cache'}")
    run = tmp_path / "run"
    started = nursery.command(_command(dataset, run, *more))
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "latest").is_file():
        assert started.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    started.wait()
    _, alive = psutil.wait_procs(children, timeout=nursery.PATIENCE)
    assert not alive
    _train(dataset, run, *more)
    assert _losses(run) == _losses(whole)
    assert newest_or_this(run).step == 6


def test_a_run_under_an_old_order_goes_on_under_it(dataset: str, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    _train(dataset, whole, "train.steps=4", "data.order=1")
    _train(dataset, run, "train.steps=2", "data.order=1")
    _train(dataset, run, "train.steps=4")
    assert _losses(run) == _losses(whole)
    assert newest_or_this(run).manifest["config"]["data"]["order"] == 1
    assert "order: 1\n" in (run / "config.yaml").read_text()


def test_a_stopped_and_resumed_run_ends_in_the_same_bits(whole: Path, dataset: str, tmp_path: Path) -> None:
    """Stopped by SIGUSR1 somewhere, then the same command again: losses, weights and optimizer states are equal."""
    run = tmp_path / "run"
    more = ("train.steps=6", "train.checkpoint_every=100")
    process = nursery.command(_command(dataset, run, *more))
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or not _losses(run):
        assert process.poll() is None, process.said()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate()[1]
    assert process.returncode == 75, said
    assert "saved; the same command goes on from there" in said
    stopped_at = newest_or_this(run).step
    assert 1 <= stopped_at < 6, "the signal came too late to show anything"
    assert f"resuming from {run}/checkpoints/step-{stopped_at:08d}" in _train(dataset, run, *more)
    assert _losses(run) == _losses(whole)
    one, two = newest_or_this(whole).path, newest_or_this(run).path
    names = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert len(names) > 10
    for name in names:
        a, b = load_file(one / name), load_file(two / name)
        assert all(bool((a[key] == b[key]).all()) for key in a), name
    assert "nothing to do" in _train(dataset, run, *more)


def test_a_run_is_mirrored_and_a_bare_directory_goes_on_from_there(dataset: str, tmp_path: Path) -> None:
    """The mirror is named late: what it lacks is sent from the start on, and what is due when the run is done."""
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    more = ("train.checkpoint_every=2", "train.keep_checkpoints=3", f"train.mirror={mirror}")
    _train(dataset, run, "train.steps=4", *more[:2])
    _train(dataset, run, "train.steps=6", *more)
    copies = whole_checkpoints(mirror)
    assert [copy.step for copy in copies] == [2, 4, 6]
    assert [fault for copy in copies for fault in verify(copy)] == []
    shutil.rmtree(run)
    shutil.rmtree(copies[-1].path)
    assert "fetching step-00000004" in _train(dataset, run, "train.steps=6", *more)
    assert list(_losses(run)) == [5, 6]
    assert [copy.step for copy in whole_checkpoints(mirror)] == [2, 4, 6]
    shutil.rmtree(copies[-1].path)
    assert "nothing to do" in _train(dataset, run, "train.steps=6", *more)
    assert [copy.step for copy in whole_checkpoints(mirror)] == [2, 4, 6]


def test_sigterm_of_one_rank_alone_stops_all_of_them(dataset: str, tmp_path: Path) -> None:
    """Slurm's signals do not reach all ranks at the same step: they agree first."""
    run = tmp_path / "run"
    process = nursery.command(_command(dataset, run, "train.steps=100000"))
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or not _losses(run):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = _children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGTERM)
    assert process.wait() == 75
    newest = newest_or_this(run)
    assert newest.step == max(_losses(run))


def _children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_run_that_does_not_fit_its_checkpoint_is_refused(whole: Path, dataset: str) -> None:
    checkpoint: Checkpoint = newest_or_this(whole)

    def check(*overrides: str) -> None:
        changed = [f"data.train={dataset}", *SMALL, *ALONE, "train.steps=6", *overrides]
        config: Any = resolve("tokenizer/tiny", changed).config
        check_same_run(config, checkpoint)

    assert checkpoint.manifest["config"]["data"]["order"] == 2
    assert checkpoint.manifest["config"]["optimizer"].pop("kind") == "adam"  # As before the key.
    check("optimizer.lr=0.5", "train.micro_batch=2", "train.log_every=3", "deepspeed.config=zero3", "codebook_group=1")
    cases = {
        "is a checkpoint of another model": "quantizer.codebook_size=128",
        "data.lanes was 8": "data.lanes=4",
        "data.order was 2": "data.order=1",
        "train.seed was 0": "train.seed=1",
    }
    for said, override in cases.items():
        with pytest.raises(UserError, match=said):
            check(override)
    checkpoint.manifest["config"]["optimizer"]["kind"] = "muon"
    with pytest.raises(UserError, match=r"optimizer\.kind was muon, .* init="):
        check()


def test_deepspeeds_own_zero_to_fp32_reads_an_export(whole: Path, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from ibq_scale.cli.main import main

    assert main(["checkpoint", "export", str(whole), "--layout", "deepspeed", "--to", str(tmp_path / "ds")]) == 0
    pieces: dict[str, list[tuple[int, Any]]] = {}
    for path in sorted((newest_or_this(whole).path / "generator").iterdir()):
        with safe_open(path, framework="pt") as f:
            starts = json.loads(f.metadata()["starts"])
            for name in f.keys():  # noqa: SIM118
                pieces.setdefault(name, []).append((starts[name], f.get_tensor(name)))
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "ds" / "generator"))
    assert {f"weights/{name}" for name in found} == {name for name in pieces if name.startswith("weights/")}
    for name, value in found.items():
        whole_vector = torch.cat([values for _, values in sorted(pieces[f"weights/{name}"], key=lambda p: p[0])])
        assert torch.equal(value.flatten(), whole_vector), name
    discriminator = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "ds" / "discriminator"))
    assert "discriminator.main.0.weight" in discriminator
    assert any(name.endswith("running_mean") for name in discriminator)
