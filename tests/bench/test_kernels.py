"""The kernels compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from ibq_scale.bench.kernels import KERNEL_NAMES, NORM_KERNEL_NAMES, OTHER_KERNEL_NAMES
from ibq_scale.cli.main import main
from ibq_scale.quantize.tiles import COLUMN_KERNELS, KERNELS, LIST_KERNELS, offered


def _run(*words: str) -> list[dict[str, Any]]:
    """In a process of its own: in this one kernels are interpreted."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ibq_scale", "bench", "kernels", *words, "--json"]
    done = subprocess.run(command, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def _fit(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Of each kernel, chip and dimension the tiles that run there on tensor cores without spills."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        good = row["fits"] and row["spill_bytes"] == 0 and row["tensor_core"] != "none"
        found.setdefault((row["kernel"], row["arch"], row["dim"]), []).extend([row] if good else [])
    return found


@pytest.mark.slow
def test_every_kernel_has_a_tile_of_tensor_cores_that_fits_and_spills_nothing() -> None:
    rows = _run("--arch", "sm_90,sm_89", "--kernel", "sums,slopes", "--dim", "256")
    found = _fit(rows)
    assert len(found) == 4
    assert all(found.values()), found
    for row in rows:
        assert row["shared_limit"] == {"sm_90": 232448, "sm_89": 101376}[row["arch"]]
        assert row["fits"] == (0 < row["shared_bytes"] <= row["shared_limit"])
        assert row["tensor_core"] == {"sm_90": "wgmma", "sm_89": "mma"}[row["arch"]]
        assert row["async_copies"] > 0
        assert 0 < row["registers"] <= 255


@pytest.mark.slow
def test_kernels_without_products_need_little() -> None:
    """So they run on every chip, for D of any size."""
    rows = _run("--kernel", ",".join(OTHER_KERNEL_NAMES), "--dim", "200", "--arch", "sm_89")
    assert {row["kernel"] for row in rows} == set(OTHER_KERNEL_NAMES) == {*LIST_KERNELS, *COLUMN_KERNELS}
    assert all(row["fits"] and row["shared_bytes"] < 48 << 10 and row["spill_bytes"] == 0 for row in rows)


@pytest.mark.slow
def test_kernels_of_norms_need_little() -> None:
    """On an old chip, one of little shared memory, and one of AMD, for 512 channels in 32 groups."""
    rows = _run("--kernel", ",".join(NORM_KERNEL_NAMES), "--dim", "512", "--arch", "sm_80,sm_89,gfx942")
    assert len(rows) == 3 * len(NORM_KERNEL_NAMES)
    assert all(row["fits"] and row["spill_bytes"] == 0 and 0 < row["registers"] <= 128 for row in rows)
    assert all(row["shared_bytes"] <= 4096 for row in rows)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_every_kernel_fits_every_chip(precision: str) -> None:
    found = _fit(_run("--arch", "sm_80,sm_86,sm_89,sm_90,sm_100,sm_120", "--precision", precision, "--dim", "8,64,256"))
    assert len(found) == len(KERNELS) * 6 * 3
    assert all(found.values()), [case for case, rows in found.items() if not rows]


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_norms_fit_every_chip_at_all_widths(precision: str) -> None:
    rows = _run(
        "--kernel", ",".join(NORM_KERNEL_NAMES), "--precision", precision, "--dim", "32,96,128,256,512", "--arch", "all"
    )
    assert all(row["fits"] and row["spill_bytes"] == 0 for row in rows), rows


def test_wrong_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--arch", "sm_90,sm_42"]) == 2
    assert "'sm_42' is none of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942, all" in capsys.readouterr().err
    assert main(["bench", "kernels", "--precision", "fp8"]) == 2
    assert main(["bench", "kernels", "--dim", "0"]) == 2
    assert main(["bench", "kernels", "--kernel", "sum"]) == 2


def test_without_triton_or_with_its_interpreter_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ibq_scale.quantize.tiles.interpreted", lambda: True)
    assert main(["bench", "kernels"]) == 2
    assert "TRITON_INTERPRET is set: unset it" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ibq_scale.quantize.tiles")
    monkeypatch.delattr("ibq_scale.quantize.tiles")
    monkeypatch.delitem(sys.modules, "ibq_scale.quantize.kernels")
    monkeypatch.delattr("ibq_scale.quantize.kernels")
    assert main(["bench", "kernels"]) == 2
    assert "needs the triton package: pip install triton" in capsys.readouterr().err


def test_the_command_names_the_kernels_that_there_are_and_tiles_no_wider_than_codes() -> None:
    assert tuple(KERNELS) == KERNEL_NAMES
    for kernel in KERNELS:
        assert {tile.dims for tile in offered(kernel, 8)} == {16}
        assert all(tile.tokens % 64 == tile.codes % 64 == 0 for tile in offered(kernel, 8))
