"""The benchmarks run, and say what they measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ibq_scale.cli.main import main
from tests import nursery


@pytest.mark.slow
def test_quantizer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ibq_scale.bench import quantizer

    words = ["bench", "quantizer", "--tokens", "64", "--dim", "16", "--repeats", "1", "--json", "--device", "cpu"]
    assert main([*words, "--codes", "512"]) == 0
    reports = json.loads(capsys.readouterr().out)
    # Of memory, each row asks a process of its own.
    monkeypatch.setattr(quantizer, "memory_alone", lambda *_: (3 * 10**8, 2 * 10**8))
    assert main([*words, "--codes", "1024,2048"]) == 0
    reports += json.loads(capsys.readouterr().out)
    assert [report["codes"] for report in reports] == [512, 1024, 2048]
    for report in reports:
        rows = {row["name"]: row for row in report["rows"]}
        assert list(rows) == ["products", "dense", "tiled", "encode dense", "encode"]
        assert rows["dense"]["times_dense"] == 1.0
        assert rows["tiled"]["flops_per_s"] == pytest.approx(
            5 * 2 * 64 * report["codes"] * 16 / rows["tiled"]["seconds"]
        )
        assert {name: (row["products_done"], row["products_needed"]) for name, row in rows.items()} == {
            "products": (5, 5), "dense": (6, 5), "tiled": (5, 5), "encode dense": (1, 1), "encode": (1, 1),
        }  # fmt: skip
        assert {row["precision"] for row in rows.values()} == {"fp32"}
        assert all(row["peak_bytes"] >= row["base_bytes"] > 10**8 for row in rows.values())


def test_sizes_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quantizer", "--codes", "4096,x"]) == 2
    assert "write one or several positive numbers" in capsys.readouterr().err


@pytest.mark.slow
def test_data(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "data", dataset, "--resolution", "32", "--batch", "4", "--seconds", "0.1", "--workers", "0"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    ours, plain = report["rates"]
    assert (ours["name"], plain["name"]) == ("ibq-scale", "plain webdataset")
    assert report["of_plain"] == pytest.approx(ours["images_per_s"] / plain["images_per_s"])
    assert main(words) == 0
    assert "× plain webdataset" in capsys.readouterr().out


# Under bf16 DeepSpeed has a lot to say.
SMALL = (
    "model.resolution=16",
    "train.precision=bf16",
    "train.global_batch=4",
    "train.micro_batch=2",
    "loss.perceptual=random",
    "data.workers=0",
)


@pytest.mark.slow
def test_tokenizer_on_noise(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = [
        "bench",
        "tokenizer",
        "tiny",
        *SMALL,
        "model.activation_checkpointing=true",
        "--steps",
        "1",
        "--ranks",
        "1",
    ]
    assert main([*words, "--ranks", "1", "--json", "--write"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["data"], report["device"], report["ranks"]) == ("synthetic", "CPU", 1)
    assert main(["plan", "tokenizer/tiny", *words[3:-4], "--device", "cpu", "--json"]) == 0
    time = json.loads(capfd.readouterr().out)["time"]
    assert time["images_per_s"] == pytest.approx(report["images_per_s"])
    assert time["basis"].startswith("rate: measured here 20")
    parts = {part["name"]: part for part in report["parts"]}
    assert {"data", "generator", "quantizer", "discriminator", "LPIPS"} < set(parts)
    assert all(part["seconds"] > 0 for part in parts.values())
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1.0)
    needed = sum(part["flops"] or 0.0 for part in parts.values())
    assert needed == pytest.approx(4 * report["flops_per_image"])
    assert report["mfu"] is report["sheet_flops"] is None
    assert report["of_product"] == pytest.approx(needed / report["step_s"] / report["product_flops"])
    assert report["images_per_s"] == pytest.approx(4 / report["step_s"])


@pytest.mark.slow
@pytest.mark.distributed
def test_tokenizer_on_data_and_two_ranks(dataset: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "tokenizer", "tiny", *SMALL, "loss.perceptual=none", f"data.train={dataset}"]
    words += ["--steps", "1", "--ranks", "2"]
    assert main(words) == 0
    out = capfd.readouterr().out
    assert f"2 × CPU of 1 threads; data {dataset}" in out
    assert "no MFU" in out
    assert "of the best product measured here (1024² in bfloat16" in out


def test_tokenizer_refuses_a_wrong_config_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tokenizer", "tiny", "model.compil=true"]) == 2
    assert "did you mean 'model.compile'?" in capsys.readouterr().err
    assert main(["bench", "tokenizer", "tiny", "--steps", "0"]) == 2


@pytest.mark.slow
def test_ar_on_random_codes(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "ar", "tiny", "model.depth=2", "model.tokens=64", "model.activation_checkpointing=full"]
    words += ["train.global_batch=4", "train.micro_batch=2", "--steps", "1", "--ranks", "1"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["data"], report["device"], report["mfu"]) == ("synthetic", "CPU", None)
    parts = {part["name"]: part for part in report["parts"]}
    assert {"data", "attention", "feed-forward", "head, loss", "communication", "optimizer, EMA"} < set(parts)
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1.0)
    needed = sum(part["flops"] or 0.0 for part in parts.values())
    assert needed == pytest.approx(4 * report["flops_per_image"])
    assert report["tokens_per_s"] == pytest.approx(4 * 64 / report["step_s"])
    assert "AdaLN" in report["flops_formula"]


def test_ar_refuses_a_wrong_config_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ar", "tiny", "model.dept=3"]) == 2
    assert "did you mean 'model.depth'?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_checkpoint(tmp_path: Path) -> None:
    words = ["bench", "checkpoint", str(tmp_path), "--megabytes", "8", "--saves", "2", "--ranks", "2", "--json"]
    done = nursery.run(words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bytes"] == 2 * 8 * 2**20
    assert 0 < report["stall_s"] < report["written_s"]
    assert report["of_disk"] == pytest.approx(report["bytes_per_s"] / report["disk_bytes_per_s"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.distributed
def test_collectives(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Large enough to take longer than 8 KiB on a machine whose scheduler takes milliseconds away.
    words = ["bench", "collectives", "--megabytes", "64", "--repeats", "5", "--ranks", "2", "--json", "--write"]
    assert main(words) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["ranks"], report["nodes"], report["bytes"], report["right"]) == (2, 1, 2**26, True)
    # Of two ranks, each sends and receives the tensor once.
    assert report["bus_bytes_per_s"] == pytest.approx(2**26 / report["seconds"])
    assert 0 < report["latency_s"] < report["seconds"]
    (kept,) = tmp_path.rglob("*.json")
    assert json.loads(kept.read_text())["links"][0]["bytes_per_s"] == report["bus_bytes_per_s"]


@pytest.mark.slow
def test_sampling(ar_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "sample", str(ar_dir), "--batch", "4", "--repeats", "1"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    ways = {way["name"]: way for way in report["ways"]}
    assert list(ways) == ["naive", "cache, step by step", "sample"]
    assert ways["sample"]["tokens_per_s"] == pytest.approx(4 * 64 / ways["sample"]["seconds"])
    assert (ways["naive"]["times_naive"], report["same_codes"]) == (1.0, True)
    # Two blocks' products and the head's, and the last modulation: width 32, hidden 256, 64 codes.
    products = 2 * (4 * 32**2 + 3 * 32 * 256) + 32 * 64 + 2 * (32**2 + 32)
    assert report["weight_bytes"] == 4 * (products + 5 * 32)
    if report["device"] == "CPU":
        assert report["bound_share"] is report["bandwidth"] is None


def test_sampling_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sample", "no-such"]) == 2
    assert "neither a preset" in capsys.readouterr().err
