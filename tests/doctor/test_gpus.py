"""What nvidia-smi's answers are taken for, and what torch's are."""

from __future__ import annotations

import pytest
import torch

from ibq_scale.doctor import gpus
from ibq_scale.doctor.tools import Subject
from ibq_scale.findings import Finding
from tests.doctor.conftest import Fake

HEALTHY = (
    "0, NVIDIA H100 80GB HBM3, 570.1, 81559, 4, Disabled, 0\n1, NVIDIA H100 80GB HBM3, 570.1, 81559, 4, Disabled, 0\n"
)
LINKED = """\x1b[4m\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tPIX\t0-31\t0\t\tN/A
GPU1\tNV18\t X \tSYS\t0-31\t0\t\tN/A
NIC0\tPIX\tSYS\t X

Legend:
  X    = Self
"""
PEERS = " \tGPU0\tGPU1\n GPU0\tX\tOK\n GPU1\tOK\tX\n\nLegend:\n"


def _look(fake: Fake, query: str = HEALTHY, topo: str = LINKED, peers: str = PEERS) -> dict[str, Finding]:
    fake("nvidia-smi", {"query-gpu": query, "topo -m": topo, "topo -p2p": peers})
    return {line.name: line for line in gpus.topology(Subject())}


def test_a_healthy_node(fake: Fake) -> None:
    found = _look(fake)
    assert set(found) == {"GPUs", "links"}
    assert found["GPUs"] == Finding("ok", "GPUs", "2 × NVIDIA H100 80GB HBM3, 80 GiB, driver 570.1")
    assert found["links"] == Finding("ok", "links", "NVLink between all 2 GPUs (NV18)")


def test_what_is_wrong_is_named(fake: Fake) -> None:
    sick = HEALTHY.replace("Disabled, 0\n1", "Enabled, 0\n1").replace("4, Disabled, 0\n", "40960, Disabled, 7\n")
    found = _look(fake, sick, LINKED.replace("NV18", "SYS"), PEERS.replace("OK", "CNS"))
    assert (found["GPUs"].level, found["GPUs"].text) == ("FAIL", "uncorrected memory errors on GPU 1")
    assert found["GPUs in use"].text == "GPU 1 (40 GiB)"
    assert found["MIG"].level == "warn"
    assert found["links"].text == "no NVLink between GPU0–GPU1 SYS"
    assert found["peer access"].text == "not between GPU0–GPU1 CNS"


def test_a_driver_that_does_not_answer(fake: Fake) -> None:
    said = "Failed to initialize NVML: Driver/library version mismatch\n"
    fake("nvidia-smi", {"query-gpu": said}, 18)
    (line,) = gpus.topology(Subject())
    assert (line.level, line.text) == ("FAIL", f"nvidia-smi: {said.strip()}")


def test_no_gpus_is_no_failure(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpus.topology(Subject()) == []
    found = {line.name: line for line in gpus.device(Subject())}
    if not torch.cuda.is_available():
        assert found["device"].level == "warn"
        assert found["attention"] == Finding("ok", "attention", "sdpa (torch)")
        assert found["quantizer"] == Finding("ok", "quantizer", "tiled")


def test_gpus_that_torch_cannot_use(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fake("nvidia-smi", {"": "| NVIDIA-SMI 470.1   Driver Version: 470.1   CUDA Version: 11.4 |\n"})
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built for CPUs" in gpus._no_cuda().text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    line = gpus._no_cuda()
    assert line.level == "FAIL"
    assert "torch is for CUDA 13.0, the driver for up to 11.4" in line.text
    assert line.todo == "install a newer driver, or torch for that CUDA"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is empty" in gpus._no_cuda().text


def test_a_package_that_is_there_and_cannot_be_imported(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "miscompiled").mkdir()
    (tmp_path / "miscompiled/__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    assert gpus.broken("miscompiled.interface") == "undefined symbol: _ZN3c10"
    assert gpus.broken("no_such_package.interface") is None
    assert gpus.broken("json.no_such_part") is None
    assert gpus.broken("json") is None
