"""The benchmarks run, and say what they measured."""

from __future__ import annotations

import json

import pytest

from ibq_scale.cli.main import main


@pytest.mark.slow
def test_quantizer(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "quantizer", "--tokens", "64", "--codes", "512,2048", "--dim", "16", "--repeats", "1"]
    assert main([*words, "--json", "--device", "cpu"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [report["codes"] for report in reports] == [512, 2048]
    for report in reports:
        rows = {row["name"]: row for row in report["rows"]}
        assert list(rows) == ["products", "dense", "tiled", "encode dense", "encode"]
        assert rows["dense"]["times_dense"] == 1.0
        assert rows["tiled"]["flops_per_s"] == pytest.approx(
            5 * 2 * 64 * report["codes"] * 16 / rows["tiled"]["seconds"]
        )
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
