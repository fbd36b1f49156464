"""What the stages of tests/gpu/quarter.py check beyond the project's own benches: one JSON line each, exit code 0 or 1.

Each check runs the commands that a user runs, and reads what they leave.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.data.codes import CodeShard, finish_codes, write_code_shard
from ibq_scale.data.manifest import CodesInfo
from ibq_scale.data.store import open_store
from ibq_scale.quantize.backend import describe
from ibq_scale.quantize.ibq import ibq_dense
from ibq_scale.quantize.quantizer import quantize
from tests.gpu.stages import CLI

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Tokens and codes: full tiles, ragged ones, one token, more tokens than codes.
SIZES = ((64, 1024), (1000, 1000), (1, 257), (513, 4096), (2048, 129), (1024, 16384))
# Relative error of gradients in the Frobenius norm: rounding of the operands over a few products in a row.
BOUNDS = {"fp32": 2e-5, "tf32": 1e-2, "bf16": 5e-2}
# bf16 keeps 8 bits: losses of a first step agree with those in fp32 to about 2⁻⁷, over many layers.
FIRST_LOSS = 5e-2
PICTURES, SIDE = 64, 288


def machine(_: argparse.Namespace) -> dict[str, Any]:
    """Versions and device."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    for name in ("triton", "deepspeed", "flash_attn", "torchao"):
        try:
            found[name] = getattr(__import__(name), "__version__", "unknown")
        except ImportError:
            found[name] = None
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        found["capability"] = f"sm_{properties.major}{properties.minor}"
    return found


def kernels(args: argparse.Namespace) -> dict[str, Any]:
    """Codes, losses and gradients of each backend against the dense form in fp64, at all sizes and precisions."""
    backends = ("triton", "cublas", "tiled") if DEVICE.type == "cuda" else ("tiled",)
    sizes = SIZES[:2] if args.small else SIZES
    rows, bad = [], 0
    for dim in (8, 64, 256):
        for tokens, codes in sizes:
            inputs = _inputs(tokens, codes, dim)
            wanted = _gradients(ibq_dense, [x.double() for x in inputs], QuantizerConfig(codebook_size=codes, dim=dim))
            for backend in backends:
                for precision in ("fp32",) if DEVICE.type == "cpu" else ("fp32", "tf32", "bf16"):
                    if backend == "triton" and "triton" not in describe(backend, DEVICE, torch.float32, dim, precision):
                        continue
                    row = _compared(backend, precision, inputs, wanted)
                    bad += not row["ok"]
                    rows.append(row)
    return {"ok": not bad, "compared": len(rows), "bad": [row for row in rows if not row["ok"]], "worst": _worst(rows)}


def _inputs(tokens: int, codes: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + codes + dim)
    shapes = ((tokens, dim), (codes, dim), (tokens, dim))
    # Scores of a few units: softmax(S) is neither flat nor one-hot.
    return [(torch.randn(shape, generator=generator) * dim**-0.25).to(DEVICE) for shape in shapes]


def _gradients(form: Callable[..., Any], inputs: list[Tensor], settings: QuantizerConfig) -> list[Tensor]:
    z_ND, rows_KD, g_ND = inputs
    z_ND, rows_KD = z_ND.clone().requires_grad_(), rows_KD.clone().requires_grad_()
    out = form(z_ND, rows_KD, settings)
    loss = (out.z_q_ND * g_ND).sum() + out.quantization_loss + out.entropy_loss
    return [out.indices_N, out.entropy_loss.detach(), *torch.autograd.grad(loss, (z_ND, rows_KD))]


def _compared(backend: str, precision: str, inputs: list[Tensor], wanted: list[Tensor]) -> dict[str, Any]:
    codes, dim = inputs[1].shape
    row: dict[str, Any] = {
        "backend": backend,
        "precision": precision,
        "tokens": len(inputs[0]),
        "codes": codes,
        "D": dim,
    }
    settings = {"codebook_size": codes, "dim": dim, "backend": backend, "logit_precision": precision}
    try:
        found = _gradients(quantize, inputs, QuantizerConfig.model_validate(settings))
    except Exception as e:  # A kernel that does not launch is a row of the table, and the others follow.
        return row | {"ok": False, "error": f"{type(e).__name__}: {e}"[:500]}
    errors = [
        float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found[2:], wanted[2:], strict=True)
    ]
    same = float((found[0] == wanted[0]).double().mean())
    ok = max(errors) <= BOUNDS[precision] and same >= (0.999 if precision == "fp32" else 0.97)
    return row | {"ok": ok, "grad_z": errors[0], "grad_rows": errors[1], "same_codes": same}


def _worst(rows: list[dict[str, Any]]) -> dict[str, float]:
    worst: dict[str, float] = defaultdict(float)
    for row in rows:
        key = f"{row['backend']} {row['precision']}"
        worst[key] = max(worst[key], row.get("grad_z", math.inf), row.get("grad_rows", math.inf))
    return worst


def data(args: argparse.Namespace) -> dict[str, Any]:
    """Draws pictures, prepares them, and writes codes, for the stages that need data."""
    root, random = args.work / "drawn", np.random.default_rng(0)
    for i in range(8 if args.small else PICTURES):
        folder = root / f"class-{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    _cli("prepare", "images", str(root), "--to", str(args.work / "pictures"))
    _write_codes(args.work / "codes", *((40, 4) if args.small else (16384, 16)))
    return {"ok": True}


def _write_codes(folder: Path, codebook_size: int, side: int) -> None:
    """Random codes of 64 pictures, of 1,000 classes."""
    store, generator = open_store(str(folder)), torch.Generator().manual_seed(0)
    info = CodesInfo(codebook_size=codebook_size, grid=(side, side), tokenizer="t" * 64, source="s" * 64)
    codes = torch.randint(codebook_size, (PICTURES, 1, side, side), generator=generator)
    labels = torch.randint(1000, (PICTURES,), generator=generator)
    shard = write_code_shard(store, "codes-0.safetensors", CodeShard(codes.numpy(), labels.numpy()), info)
    finish_codes(store, [shard], [str(label) for label in range(1000)], info)


def resume(args: argparse.Namespace) -> dict[str, Any]:
    """Two steps with a checkpoint after each. The second step is taken again from the first checkpoint."""
    run = args.work / args.preset.replace("/", "-")
    words = [*_training(args, run), "train.steps=2", "train.checkpoint_every=1", "train.log_every=1"]
    began = time.monotonic()
    _cli("train", *words)
    first = time.monotonic() - began
    lines = _metrics(run)
    shutil.rmtree(run / "checkpoints/step-00000002")
    _cli("train", *words)
    again = _metrics(run)[-1]
    planned = _cli("plan", args.preset, "--json", *_gpu()) if DEVICE.type == "cuda" else "null"
    off = abs(again["loss"] - lines[-1]["loss"]) / abs(lines[-1]["loss"])
    shutil.rmtree(run)
    return {
        "ok": off < 1e-3,
        "losses": [line["loss"] for line in lines],
        "resumed_off": off,
        "seconds": first,
        "memory": lines[-1].get("memory_bytes"),
        "planned": (json.loads(planned) or {}).get("memory"),
    }


def first_loss(args: argparse.Namespace) -> dict[str, Any]:
    """The first step's losses on this device in bf16 beside those on the CPU in fp32, same weights and pictures."""
    common = ("train.steps=1", "train.log_every=1", "train.global_batch=2", "train.micro_batch=2")
    here, there = args.work / "first-here", args.work / "first-cpu"
    _cli("train", *_training(args, here), *common)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    _cli("train", *_training(args, there), *common, "train.precision=fp32", env=hidden)
    (found,), (wanted,) = _metrics(here), _metrics(there)
    names = [name for name in ("loss", "l1", "quantization", "sample_entropy", "batch_entropy") if name in wanted]
    off = {name: abs(found[name] - wanted[name]) / max(abs(wanted[name]), 1e-3) for name in names}
    for run in (here, there):
        shutil.rmtree(run)
    return {"ok": off["loss"] < FIRST_LOSS, "off": off, "here": found["loss"], "cpu": wanted["loss"]}


def profile(args: argparse.Namespace) -> dict[str, Any]:
    """A traced step: the kernels with the most time, and their share."""
    run = args.work / "profiled"
    batch = ("train.global_batch=32", "train.micro_batch=32") if DEVICE.type == "cuda" else ()
    _cli("train", *_training(args, run), "train.steps=4", "train.profile=[4,4]", "train.log_every=1", *batch)
    (trace,) = run.glob("profile/*.json.gz")
    shutil.copyfile(trace, args.out / "step.json.gz")
    spent: dict[str, float] = defaultdict(float)
    kind = "kernel" if DEVICE.type == "cuda" else "cpu_op"
    for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]:
        if event.get("cat") == kind:
            spent[event["name"][:100]] += event["dur"] / 1e3
    total = sum(spent.values())
    top = sorted(spent.items(), key=lambda item: -item[1])[:25]
    shutil.rmtree(run)
    return {"ok": bool(spent), "kernel_ms": total, "top": [[name, ms, ms / total] for name, ms in top]}


def tokenize(args: argparse.Namespace) -> dict[str, Any]:
    """What `tokenize` reports for ten crops of each picture."""
    preset = "tokenizer/tiny" if args.small else "tokenizer/ibq-16384"
    run = args.work / "tokenizer"
    args.preset = preset
    _cli("train", *_training(args, run), "train.steps=1", "train.global_batch=8", "train.micro_batch=8")
    target = str(args.work / "codes-ten")
    words = ("--to", target, "--crops", "ten", "--batch", "64", "--json")
    found: dict[str, Any] = json.loads(_cli("tokenize", str(run), str(args.work / "pictures"), *words))
    shutil.rmtree(run)
    return found


def usage(args: argparse.Namespace) -> dict[str, Any]:
    """Usage and losses over the steps that fit into the seconds given, at 128², with one kind of quantizer."""
    pictures = args.work / "pictures"
    if args.pictures is not None:
        pictures = args.work / "given"
        if not pictures.exists():
            _cli("prepare", "images", str(args.pictures), "--to", str(pictures))
    run = args.work / f"usage-{args.kind}-{args.codes}"
    words = [
        "tokenizer/experiment",
        f"out={run}",
        f"data.train={pictures}",
        "train.steps=100000",
        "train.checkpoint_every=100000",
        "model.channel_multipliers=[1,2,2,4]",
        "model.z_channels=128",
        f"quantizer.kind={args.kind}",
        f"quantizer.codebook_size={args.codes}",
        "optimizer.lr=1e-3",
    ]
    if args.small:
        words += ["model.resolution=32", "train.global_batch=4", "train.micro_batch=4", "train.log_every=2"]
    else:
        words += ["model.channels=64", "model.resolution=128", "data.workers=8", "train.log_every=20"]
    process = subprocess.Popen([*CLI, "train", "tokenizer", *words], stdout=sys.stderr)
    deadline = time.monotonic() + args.seconds + 40
    # The seconds count from the first logged step: the start is not what is measured.
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(args.seconds)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    names = ("step", "usage", "perplexity", "l1", "samples_per_s")
    curve = [{name: line[name] for name in names if name in line} for line in _metrics(run)]
    return {"ok": bool(curve), "curve": curve}


def _training(args: argparse.Namespace, run: Path) -> list[str]:
    """The words of `train` for a preset on the data of `data`."""
    task, _, name = args.preset.partition("/")
    words = [task, name, f"out={run}", "data.workers=2"]
    if task == "tokenizer":
        return [*words, f"data.train={args.work / 'pictures'}", "loss.perceptual=random"]
    sizes = () if args.preset != "ar/tiny" else ("model.codebook_size=40", "model.tokens=16", "model.classes=1000")
    return [*words, f"data.train={args.work / 'codes'}", *sizes]


def _gpu() -> tuple[str, ...]:
    """The words of `plan` for this GPU: the short name within its own name, or its memory alone."""
    properties = torch.cuda.get_device_properties(0)
    short = next((name for name in ("h200", "h100", "b200", "a100-80gb") if name[:4] in properties.name.lower()), None)
    return ("--device", short) if short else ("--memory", f"{properties.total_memory / 1e9:.0f}")


def _cli(*words: str, env: dict[str, str] | None = None) -> str:
    """The standard output of a command. CalledProcessError where it fails; its errors go to ours."""
    done = subprocess.run([*CLI, *words], stdout=subprocess.PIPE, env=os.environ | (env or {}), check=True)
    return done.stdout.decode()


def _metrics(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8") if (run / "metrics.jsonl").exists() else ""
    return [json.loads(line) for line in text.splitlines()]


CHECKS = {
    "machine": machine,
    "kernels": kernels,
    "data": data,
    "resume": resume,
    "first-loss": first_loss,
    "profile": profile,
    "tokenize": tokenize,
    "usage": usage,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    family = parser.add_subparsers(required=True)
    for name, check in CHECKS.items():
        own = family.add_parser(name)
        own.set_defaults(check=check)
        own.add_argument("--small", action="store_true")
        if name in ("resume", "first-loss", "profile"):
            own.add_argument("preset")
        if name == "usage":
            own.add_argument("kind")
            own.add_argument("codes", type=int)
            own.add_argument("--seconds", type=float, default=30)
            own.add_argument("--pictures", type=Path)
        if name not in ("machine", "kernels"):
            own.add_argument("work", type=Path)
        if name == "profile":
            own.add_argument("out", type=Path)
    args = parser.parse_args()
    found = args.check(args)
    print(json.dumps(found))
    return 0 if found.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
