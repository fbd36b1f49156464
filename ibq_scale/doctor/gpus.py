"""GPUs and their links by nvidia-smi, torch's use of them, and the kernels for them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import time
from collections.abc import Callable
from itertools import combinations
from typing import TYPE_CHECKING

from ibq_scale.console import several
from ibq_scale.doctor.tools import NO_TOOL, Subject, ask, first
from ibq_scale.findings import Finding, fail, ok, warn

if TYPE_CHECKING:
    import torch

QUERY = "index,name,driver_version,memory.total,memory.used,mig.mode.current,ecc.errors.uncorrected.volatile.total"
# Memory of an idle GPU, taken by the driver.
IDLE_MIB = 2048
SLOW_IMPORT_SECONDS = 20.0
# The transformers' presets have heads of 64 to 128, the tokenizers' codes up to 256 dimensions.
HEAD, CODE = 64, 256


def topology(subject: Subject) -> list[Finding]:
    """Findings from nvidia-smi. None without it."""
    code, said = ask("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", seconds=20)
    if code == NO_TOOL:
        return []
    if code:
        todo = "the driver does not answer: restart it, or leave this node out (sbatch --exclude)"
        return [fail("GPUs", f"nvidia-smi: {first(said)}", todo)]
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.count(",") == 6]
    if not rows:
        return [warn("GPUs", "nvidia-smi lists none", "ask for them: srun --gpus-per-node=8 ibq-scale doctor")]
    names = sorted({row[1] for row in rows})
    seen = f"{len(rows)} × {' and '.join(names)}, {float(rows[0][3]) / 1024:,.0f} GiB, driver {rows[0][2]}"
    lines = _faults(rows)
    if not any(line.name == "GPUs" for line in lines):
        lines.insert(0, ok("GPUs", seen))
    return lines + ([_links(len(rows)), *_peers()] if len(rows) > 1 else [])


def listed() -> int:
    code, said = ask("nvidia-smi", "-L")
    return 0 if code else len(re.findall(r"^GPU \d+", said, re.MULTILINE))


def _faults(rows: list[list[str]]) -> list[Finding]:
    lines = []
    broken = [f"GPU {row[0]}" for row in rows if row[6].isdigit() and int(row[6])]
    if broken:
        todo = "reset it, or leave this node out (sbatch --exclude) and tell the administrators"
        lines.append(fail("GPUs", f"uncorrected memory errors on {several(broken)}", todo))
    busy = [f"GPU {row[0]} ({float(row[4]) / 1024:,.0f} GiB)" for row in rows if _number(row[4]) > IDLE_MIB]
    if busy:
        lines.append(warn("GPUs in use", f"{several(busy)}", "nvidia-smi names the processes"))
    if any(row[5] == "Enabled" for row in rows):
        lines.append(warn("MIG", "on", "one rank a slice, and NCCL joins no slices of one GPU: train on whole GPUs"))
    return lines


def _number(text: str) -> float:
    return float(text) if text.replace(".", "", 1).isdigit() else 0.0


def _links(gpus: int) -> Finding:
    what = "links"
    pairs = _matrix(ask("nvidia-smi", "topo", "-m")[1])
    if not pairs:
        return warn(what, "'nvidia-smi topo -m' has no output", "not available in some containers: see the all-reduce")
    kinds = sorted(set(pairs.values()))
    if all(kind.startswith("NV") for kind in kinds):
        return ok(what, f"NVLink between all {gpus} GPUs ({', '.join(kinds)})")
    slow = [f"{a}–{b} {kind}" for (a, b), kind in pairs.items() if not kind.startswith("NV")]
    todo = "expected of PCIe cards; ZeRO-3 and a codebook over such pairs are slow"
    return warn(what, f"no NVLink between {several(slow)}", todo)


def _peers() -> list[Finding]:
    """A warning for GPU pairs without peer access: their copies go through the host."""
    pairs = _matrix(ask("nvidia-smi", "topo", "-p2p", "r")[1])
    shut = [f"{a}–{b} {state}" for (a, b), state in pairs.items() if state != "OK"]
    todo = "IOMMU or PCIe access control of the host blocks direct copies: NCCL copies through host memory"
    return [warn("peer access", f"not between {several(shut)}", todo)] if shut else []


def _matrix(said: str) -> dict[tuple[str, str], str]:
    """The cells for each pair of GPUs, from a table of nvidia-smi."""
    lines = [line.split() for line in re.sub(r"\x1b\[\d*m", "", said).splitlines()]
    header = next((words for words in lines if len(words) > 1 and words[:2] == ["GPU0", "GPU1"]), [])
    gpus = [word for word in header if re.fullmatch(r"GPU\d+", word)]
    rows = {
        words[0]: dict(zip(gpus, words[1:], strict=False))
        for words in lines
        if words and words is not header and words[0] in gpus
    }
    return {(a, b): rows[a][b] for a, b in combinations(gpus, 2) if b in rows.get(a, {})}


def device(subject: Subject) -> list[Finding]:
    begin = time.perf_counter()
    import torch

    seconds = time.perf_counter() - begin
    lines = []
    if seconds > SLOW_IMPORT_SECONDS:
        todo = "the environment is on a slow disk, and every rank waits at every start: use a container or a local copy"
        lines.append(warn("torch", f"took {seconds:.0f} s to import", todo))
    if not torch.cuda.is_available():
        return [*lines, _no_cuda(), *_kernels(torch.device("cpu"))]
    from ibq_scale.distributed.rendezvous import device_faults

    count = torch.cuda.device_count()
    faults = [fault for i in range(count) for fault in device_faults(torch.device("cuda", i))]
    build = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    if faults:
        return [*lines, fail("device", several(faults), f"{build}: see nvidia-smi, or leave this node out")]
    seen = f"{count} × {torch.cuda.get_device_name(0)}; {build}"
    if torch.cuda.get_device_capability(0)[0] < 8:
        lines.append(warn("device", seen, "no bf16 in hardware: train.precision=fp32"))
    else:
        lines.append(ok("device", seen))
    return lines + _kernels(torch.device("cuda", 0))


def _no_cuda() -> Finding:
    import torch

    what, cores = "device", len(os.sched_getaffinity(0))
    driver = re.search(r"CUDA Version: (\d+\.\d+)", ask("nvidia-smi")[1])
    if driver is None:
        todo = "right for a trial and on a login node. To see a job's GPUs: srun --gpus-per-node=8 ibq-scale doctor"
        return warn(what, f"no GPU: computes on {cores} cores (torch {torch.__version__})", todo)
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return fail(what, "there are GPUs, but CUDA_VISIBLE_DEVICES is empty", "unset CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        return fail(what, f"there are GPUs, but torch {torch.__version__} is built for CPUs", "install torch for CUDA")
    why = _first_error(lambda: torch.zeros(1, device="cuda")) or "torch sees none"
    older = int(driver[1].split(".")[0]) < int(torch.version.cuda.split(".")[0])
    todo = "install a newer driver, or torch for that CUDA" if older else "does the container pass on /dev/nvidia*?"
    seen = f"there are GPUs, but {why}; torch is for CUDA {torch.version.cuda}, the driver for up to {driver[1]}"
    return fail(what, seen, todo)


def _kernels(where: torch.device) -> list[Finding]:
    import torch

    from ibq_scale.models.attention import attention, choose, describe
    from ibq_scale.quantize.backend import choose as choose_passes

    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    kind = choose("auto", where, dtype, HEAD)

    def attend() -> None:
        q = torch.randn(1, 64, 2, HEAD, device=where, dtype=dtype, requires_grad=True)
        torch.autograd.grad(attention(q, q, q, causal=True, kind=kind).sum(), q)

    passes = choose_passes("auto", where, torch.float32, CODE)
    compiler = "triton needs a C compiler on PATH. Else set backend=tiled"
    lines = [
        _tried("attention", describe(kind, where), attend, "model.attention=sdpa needs no such package"),
        _tried("quantizer", passes, lambda: _quantize(where), compiler),
    ]
    if where.type == "cuda":
        lines.append(
            _tried(
                "norm", *_norm(where), "triton needs Python's headers too. Without a C compiler on PATH torch's runs"
            )
        )
        lines += _broken_packages(where)
    return lines


def _norm(where: torch.device) -> tuple[str, Callable[[], object]]:
    import torch

    from ibq_scale.models.norm import GroupNormSiLU, runs_fused

    x = torch.randn(2, 64, 8, 8, device=where, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    seen = "fused with SiLU" if runs_fused(x) else "torch's, since triton or a C compiler is missing"
    norm = GroupNormSiLU(32, 64, device=where)
    return seen, lambda: torch.autograd.grad(norm(x.requires_grad_()).sum(), x)


def _tried(what: str, seen: str, work: Callable[[], object], todo: str) -> Finding:
    why = _first_error(work)
    return fail(what, f"{seen} fails: {why}", todo) if why else ok(what, seen)


def _quantize(where: torch.device) -> None:
    import torch

    from ibq_scale.config.models import QuantizerConfig
    from ibq_scale.quantize.quantizer import quantize

    z_ND = torch.randn(64, CODE, device=where, requires_grad=True)
    rows_KD = torch.randn(128, CODE, device=where, requires_grad=True)
    quantized = quantize(z_ND, rows_KD, QuantizerConfig(codebook_size=128, dim=CODE))
    torch.autograd.grad(quantized.z_q_ND.sum(), (z_ND, rows_KD))


def _first_error(work: Callable[[], object]) -> str | None:
    try:
        work()
    except Exception as e:
        return f"{type(e).__name__}: {first(str(e))}"
    return None


def _broken_packages(where: torch.device) -> list[Finding]:
    """flash-attn packages for this GPU, installed but broken at import."""
    import torch

    from ibq_scale.models.attention import PACKAGES

    major = torch.cuda.get_device_capability(where)[0]
    lines = []
    for package in PACKAGES.values():
        why = broken(package.module) if major in package.capabilities else None
        if why:
            todo = f"build it against torch {torch.__version__}. Training works without it"
            lines.append(warn(package.name, f"installed, and cannot be imported: {why}", todo))
    return lines


def broken(module: str) -> str | None:
    """The import error of an installed module. None without an error, or without the module."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return None
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as e:
        return None if e.name and module.startswith(e.name) else first(str(e))
    except Exception as e:
        return first(str(e))
    return None
