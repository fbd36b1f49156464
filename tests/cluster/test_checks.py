"""What is found wrong before a job is queued, and what is said about it."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ibq_scale.checkpoint.reading import manifest_text
from ibq_scale.cluster import checks, room
from ibq_scale.cluster.checks import Submission, run_checks, seconds
from ibq_scale.cluster.render import Script
from ibq_scale.config.layers import resolve
from ibq_scale.errors import UserError
from ibq_scale.findings import Finding
from ibq_scale.supervise.run_lock import Holder, RunLock
from tests.cluster.fake_slurm import FakeSlurm
from tests.samples import write_codes

BASE = {"nodes": "2", "ntasks-per-node": "1", "gpus-per-node": None, "time": "01:00:00", "signal": "USR1@300"}


def _job(
    source: str, run: Path, *overrides: str, options: dict[str, str | None] | None = None, **job: Any
) -> Submission:
    config = resolve(source, [f"out={run}", *overrides]).config
    script = Script.of(f"train_{config.task}").with_options(BASE | (options or {}))
    return Submission(script, config, **({"gpu": None} | job))


def _found(job: Submission, only: Sequence[str] = ()) -> dict[str, Finding]:
    """By name. `only`: leave the others out, and with them what takes long."""
    kept = [entry for entry in checks.CHECKS if not only or entry[0] in only]
    return {check.name: check for check in run_checks(job, kept)}


@pytest.mark.slow
def test_all_is_well(slurm: FakeSlurm, dataset: str, tmp_path: Path) -> None:
    job = _job("tokenizer/tiny", tmp_path / "run", f"data.train={dataset}")
    found = _found(job)
    assert {name: check.level for name, check in found.items()} == dict.fromkeys(
        ("config", "batch", "codebook", "deepspeed", "memory", "data", "resume", "disk", "run", "time", "slurm"), "ok"
    )
    assert "512 on each" in found["codebook"].text
    assert found["slurm"].text.startswith("would start at 2026-11-24")
    assert slurm.tested == job.script.text
    assert not (tmp_path / "run").exists(), "a look leaves nothing"


def test_a_batch_that_does_not_divide_leaves_out_what_depends_on_it(
    slurm: FakeSlurm, dataset: str, tmp_path: Path
) -> None:
    found = _found(_job("tokenizer/tiny", tmp_path, f"data.train={dataset}", options={"nodes": "3"}))
    assert found["batch"].level == "FAIL"
    assert "a train.global_batch that is a multiple of 3 would fit" in found["batch"].text
    assert not {"codebook", "deepspeed", "memory", "disk"} & set(found)
    assert found["data"].level == "ok"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["codebook_group=3"], "codebook_group=3 does not divide"),
        (["quantizer.codebook_size=1001", "codebook_group=2"], "is not divided by"),
    ],
)
def test_a_codebook_that_does_not_divide(tmp_path: Path, overrides: list[str], said: str) -> None:
    found = _found(_job("tokenizer/tiny", tmp_path, *overrides), ["codebook"])
    assert found["codebook"].level == "FAIL"
    assert said in found["codebook"].text


def test_deepspeeds_json(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"train_batch_size": 3}')
    for name, said in (("absent.json", "not found"), (tmp_path / "mine.json", "follows from train.global_batch")):
        found = _found(_job("tokenizer/tiny", tmp_path, f"deepspeed.config={name}"), ["deepspeed"])
        assert found["deepspeed"].level == "FAIL"
        assert said in found["deepspeed"].text


@pytest.mark.slow
def test_memory_is_judged_where_the_gpu_is_known(tmp_path: Path) -> None:
    gpus: dict[str, str | None] = {"gpus-per-node": "a100:4", "ntasks-per-node": "4"}

    def memory(*overrides: str, options: dict[str, str | None] = gpus, gpu: str | None) -> Finding:
        return _found(_job("ar/tiny", tmp_path, *overrides, options=options, gpu=gpu), ["memory"])["memory"]

    # 8 ranks: a micro-batch of 2 divides 16.
    fits = memory("train.micro_batch=2", gpu="h100")
    assert (fits.level, "of 80.00 GB" in fits.text) == ("ok", True)
    large = memory("train.micro_batch=2048", "train.global_batch=16384", "model.width=512", gpu="l4")
    assert large.level == "FAIL"
    assert "a l4 has 24.00 GB: a smaller train.micro_batch" in large.text
    assert memory("train.micro_batch=2", gpu=None).level == "warn"
    assert memory("train.micro_batch=2", gpu="h1000").level == "warn"
    shared = memory(gpu="h100", options={"gpus-per-node": "8", "ntasks-per-node": "1"})
    assert (shared.level, "a rank takes one GPU" in shared.text) == ("FAIL", True)


def test_data_of_the_right_kind_and_size(dataset: str, tmp_path: Path) -> None:
    write_codes(tmp_path / "codes")
    fitting = ("model.codebook_size=40", "model.tokens=16", "model.classes=3")

    def data(source: str, *overrides: str) -> Finding:
        return _found(_job(source, tmp_path / "run", *overrides), ["data"])["data"]

    assert data("ar/tiny", f"data.train={tmp_path / 'codes'}", *fitting).level == "ok"
    for source, overrides, said in (
        ("ar/tiny", [f"data.train={dataset}"], "holds images, codes are needed"),
        ("tokenizer/tiny", [f"data.train={tmp_path}"], "has no manifest.json"),
        ("ar/tiny", [f"data.train={tmp_path / 'codes'}"], "set model.codebook_size=40"),
        ("ar/tiny", [f"data.train={tmp_path / 'codes'}", *fitting, f"validation.data={dataset}"], "codes are needed"),
        ("tokenizer/tiny", [f"data.train={dataset}", f"validation.data={tmp_path}"], "has no manifest.json"),
        ("tokenizer/tiny", [f"data.train={dataset}", f"validation.data={dataset}"], "is what the run trains on"),
    ):
        found = data(source, *overrides)
        assert found.level == "FAIL"
        assert said in found.text


def _checkpoint(job: Submission, step: int, data_hash: str) -> None:
    folder = job.run_dir / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    manifest = {"format_version": 3, "step": step, "samples": 0, "files": {}, "data_hash": data_hash}
    (folder / "manifest.json").write_text(manifest_text(manifest | {"config": job.config.model_dump(mode="json")}))


def test_a_checkpoint_must_be_of_this_run(dataset: str, tmp_path: Path) -> None:
    def job(*overrides: str) -> Submission:
        return _job("tokenizer/tiny", tmp_path / "run", f"data.train={dataset}", *overrides)

    assert "starts from step 0" in _found(job(), ["resume"])["resume"].text
    _checkpoint(job(), 100, job().sets.hash)
    found = _found(job(), ["resume"])["resume"]
    assert (found.level, found.text) == ("ok", "goes on from step 100 of 300")
    for overrides, said in (
        (["model.channels=64"], "another model: 'model' has channels=32 there and 64 here"),
        (["train.seed=1"], "train.seed was 0"),
    ):
        found = _found(job(*overrides), ["resume"])["resume"]
        assert found.level == "FAIL"
        assert said in found.text
    assert _found(job("train.steps=100"), ["resume"])["resume"].level == "warn"
    _checkpoint(job(), 200, "0" * 64)
    found = _found(job(), ["resume"])["resume"]
    assert (found.level, "holds other data than before" in found.text) == ("FAIL", True)


def test_a_model_to_start_from_must_be_there(tmp_path: Path) -> None:
    found = _found(_job("tokenizer/tiny", tmp_path / "run", f"init={tmp_path / 'absent'}"), ["resume"])["resume"]
    assert (found.level, "does not exist" in found.text) == ("FAIL", True)


def test_weights_of_the_loss_must_be_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBQ_SCALE_WEIGHTS", str(tmp_path))
    job = _job("tokenizer/tiny", tmp_path / "run", "loss.perceptual=vgg")
    found = _found(job, ["weights"])["weights"]
    assert (found.level, "'ibq-scale fetch-weights vgg'" in found.text) == ("FAIL", True)
    (tmp_path / "vgg16-397923af.pth").touch()
    assert _found(job, ["weights"])["weights"].level == "ok"
    named = _job("tokenizer/tiny", tmp_path / "run", "validation.data=x", "validation.metrics=[lpips,rfid]")
    found = _found(named, ["weights"])["weights"]
    assert (found.level, "'ibq-scale fetch-weights inception'" in found.text) == ("FAIL", True)
    assert "vgg" not in found.text


def test_wandb_wants_a_login(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online = _job("tokenizer/tiny", tmp_path, "wandb.mode=online")
    assert _found(online, ["wandb"])["wandb"].level == "warn"
    (slurm.folder / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (slurm.folder / ".netrc").chmod(0o600)
    assert _found(online, ["wandb"])["wandb"].level == "ok"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    assert _found(online, ["wandb"])["wandb"].level == "warn"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert _found(online, ["wandb"])["wandb"].level == "ok"
    assert "wandb" not in _found(_job("tokenizer/tiny", tmp_path, "wandb.mode=offline"), ["wandb"])


@pytest.mark.slow
def test_the_disk_must_hold_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk(*overrides: str) -> Finding:
        return _found(_job("ar/tiny", tmp_path / "new/run", *overrides), ["disk"])["disk"]

    each = _job("ar/tiny", tmp_path).plan.checkpoint_bytes
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 4 * each))
    assert disk().level == "ok", "two are kept, and a third is being written"
    assert disk("train.keep_checkpoints=4").level == "FAIL"
    assert disk("train.keep_every=100").level == "warn", "and three for good"
    monkeypatch.setattr(checks, "can_hold", lambda folder, size: size < 2 * each)
    refused = disk()
    assert (refused.level, "of your quota" in refused.text) == ("FAIL", True)


def test_room_is_asked_of_the_file_system(tmp_path: Path) -> None:
    assert room.can_hold(tmp_path, 1 << 20) in (True, None)
    assert room.nearest(tmp_path / "a/b") == tmp_path
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        assert room.can_hold(tmp_path, 2 << 20) in (False, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot write"):
        room.can_hold(Path("/proc"), 1)


def test_one_job_at_a_time_in_a_run_directory(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def alone() -> Finding:
        return _found(_job("tokenizer/tiny", run), ["run"])["run"]

    assert alone().level == "ok"
    slurm.queue("7|RUNNING|2|node[0-1]|None|ibq-scale /elsewhere", f"8|PENDING|2||Priority|ibq-scale {run}")
    assert "has job 8 (pending) already" in alone().text
    slurm.queue("7|RUNNING|2|node[0-1]|None|", "9|RUNNING|2|node[0-1]|None|by hand")
    assert alone().level == "ok"
    (run / "lock").mkdir(parents=True)
    (run / "lock/00000001").write_text(json.dumps(asdict(Holder.me()) | {"job": "9", "host": "node0"}))
    assert "has job 9 (running) already" in alone().text, "nobody submitted it with submit, but it holds the lock"
    slurm.queue()
    assert alone().level == "warn", "on another host, and nobody knows"
    (run / "lock/00000001").unlink()
    lock = RunLock(run)
    assert f"is trained by process {os.getpid()}" in alone().text
    lock.release()
    assert alone().level == "ok"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"signal": "USR1@200"}, "leaves less than train.grace=270 s"),
        ({"signal": None}, "--signal must be"),
        ({"time": "5"}, "no longer than the 300 s"),
        ({"time": "soon"}, "is not a time limit"),
    ],
)
def test_time_for_the_save(tmp_path: Path, options: dict[str, str | None], said: str) -> None:
    found = _found(_job("tokenizer/tiny", tmp_path, options=options), ["time"])["time"]
    assert found.level == "FAIL"
    assert said in found.text


def test_time_limits_as_sbatch_reads_them() -> None:
    texts = ("30", "30:15", "24:00:00", "2-12", "2-12:30", "1-00:00:01", "UNLIMITED")
    limits = (1800, 1815, 86400, 216_000, 217_800, 86_401, None)
    assert tuple(seconds(text) for text in texts) == limits


def test_what_slurm_itself_refuses(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.refuse("sbatch: error: invalid partition specified: nosuch\nallocation failure: Invalid partition name\n")
    found = _found(_job("tokenizer/tiny", tmp_path), ["slurm"])["slurm"]
    assert (found.level, "invalid partition specified: nosuch" in found.text) == ("FAIL", True)


def test_a_machine_without_a_cluster(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.lead_nowhere()
    found = _found(_job("tokenizer/tiny", tmp_path, queue=False), ["run", "slurm"])
    assert [found["run"].level, found["slurm"].level] == ["ok", "warn"], "to look at the file is possible"
    assert _found(_job("tokenizer/tiny", tmp_path), ["slurm"])["slurm"].level == "FAIL"
