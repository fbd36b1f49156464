"""Packages, DeepSpeed's compiler, pretrained weights, W&B."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from ibq_scale.config.secrets import has_wandb_login, wandb_host
from ibq_scale.console import several
from ibq_scale.doctor.disks import file_system, is_shared
from ibq_scale.doctor.tools import Subject, ask
from ibq_scale.findings import Finding, fail, ok, warn

# Always named in the line of packages. Others appear only if wrong.
NAMED = ("torch", "deepspeed", "torchvision", "s3fs", "webdataset", "numpy")
# The extra of pyproject.toml for training.
TRAINING = "train"
# Optional packages of training.
OPTIONAL = ("flash-attn", "flash-attn-4", "torchao", "pyarrow")


def packages(subject: Subject) -> list[Finding]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python, wanted = _bounds()
    faults, found = [], {}
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": TRAINING}):
            continue
        version = installed(requirement.name)
        if version is None:
            faults.append((f"{requirement.name} is not installed", requirement))
        elif not requirement.specifier.contains(version, prereleases=True):
            faults.append((f"{requirement.name} {version}, where {requirement.specifier} is asked for", requirement))
        else:
            found[requirement.name.lower()] = version
    lines = [fail("packages", said, f"pip install '{wish.name}{wish.specifier}'") for said, wish in faults]
    optional = [f"{name} {version}" for name in OPTIONAL if (version := installed(name))]
    if not lines:
        named = ", ".join(f"{name} {found[name]}" for name in NAMED if name in found)
        extra = f"; optional: {', '.join(optional)}" if optional else ""
        lines.append(ok("packages", f"all {len(found)} within their bounds: {named}{extra}"))
    version = ".".join(map(str, sys.version_info[:3]))
    if python and not SpecifierSet(python).contains(version):
        lines.append(fail("python", f"{version}, where {python} is asked for", "make the environment with a newer one"))
    return lines


def installed(name: str) -> str | None:
    """A package's version, None if not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _bounds() -> tuple[str, list[str]]:
    """Bounds of Python and of the packages: from the checkout, else from the installed package."""
    checkout = Path(__file__).parents[2] / "pyproject.toml"
    if checkout.is_file():
        project = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]
        wanted = [*project["dependencies"], *project["optional-dependencies"][TRAINING]]
        return project["requires-python"], wanted
    own = metadata.distribution("ibq-scale")
    return str(own.metadata["Requires-Python"] or ""), list(own.requires or [])


def deepspeed(subject: Subject) -> list[Finding]:
    """DeepSpeed's accelerator, and the compiler for its operators."""
    import torch

    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    name, backend = accelerator._name, accelerator.communication_backend_name()
    lines = [ok("DeepSpeed", f"{deepspeed.__version__}, accelerator {name}, {backend}")]
    if cuda and name != "cuda":
        todo = "unset DS_ACCELERATOR" if "DS_ACCELERATOR" in os.environ else "install DeepSpeed beside this torch"
        lines = [fail("DeepSpeed", f"{deepspeed.__version__} computes on {name}, though there is a GPU", todo)]
    return [*lines, _compiler(torch.version.cuda if cuda else None), *extensions()]


def _compiler(cuda: str | None) -> Finding:
    what = "compiler"
    use = "an offloaded optimizer's operator (zero2_offload, zero3_offload) is compiled at the first start"
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    lacking = [name for name, path in (("c++", compiler), ("ninja", shutil.which("ninja"))) if path is None]
    if lacking:
        todo = f"needed only where {use}: put it on PATH (ninja is in the environment's bin/)"
        return warn(what, f"no {' and no '.join(lacking)} on PATH", todo)
    if cuda is None:
        return ok(what, f"{compiler}, ninja")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return warn(what, f"{compiler}, ninja; no nvcc", f"load CUDA {cuda}'s module where {use}")
    release = re.search(r"release (\d+)\.(\d+)", ask(nvcc, "--version")[1])
    if release and release[1] != cuda.split(".")[0]:
        todo = f"DeepSpeed compiles nothing with it: load CUDA {cuda.split('.')[0]}'s module where {use}"
        return warn(what, f"nvcc {release[1]}.{release[2]}, but torch is for CUDA {cuda}", todo)
    return ok(what, f"{compiler}, ninja, {nvcc}")


def extensions() -> list[Finding]:
    """The folder of compiled operators: local, and without the lock of a killed build."""
    what = "TORCH_EXTENSIONS_DIR"
    named = os.environ.get(what)
    folder = Path(named or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "torch_extensions")
    locks = sorted(str(path) for path in folder.glob("**/lock")) if folder.is_dir() else []
    if locks:
        todo = f"if nothing is compiling now, a killed build left it and the next one waits for ever: rm {locks[0]}"
        return [warn(what, f"a build's lock in {folder}", todo)]
    if is_shared(folder):
        todo = "set it to the node's own disk (the sbatch files do): on a shared one all ranks wait for one lock"
        return [warn(what, f"{folder} is on {file_system(folder)}", todo)]
    return [ok(what, f"{folder} ({file_system(folder)})")]


def weights(subject: Subject) -> list[Finding]:
    from ibq_scale.losses.weights import SOURCES, status, weights_folder

    found = status(list(SOURCES))
    lines = [
        fail("weights", f"{f.path} is damaged", f"ibq-scale fetch-weights {f.name}")
        for f in found
        if f.state == "damaged"
    ]
    absent, there = ([f.name for f in found if f.state == state] for state in ("missing", "there"))
    if absent:
        todo = f"'ibq-scale fetch-weights {' '.join(absent)}' on a node with internet. Runs that need them do not start"
        lines.append(warn("weights", f"no {several(absent)} in {weights_folder()}", todo))
    if there and not absent:
        lines.append(ok("weights", f"{several(there)} in {weights_folder()}"))
    return lines


def wandb(subject: Subject) -> list[Finding]:
    what = "W&B"
    version = installed("wandb")
    if version is None:
        return [fail(what, "not installed", "pip install wandb")]
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return [ok(what, f"{version}, WANDB_MODE={mode}")]
    host = wandb_host()
    if has_wandb_login(host):
        return [ok(what, f"{version}, logged in to {host}")]
    todo = "for runs with wandb.mode=online only: 'wandb login', or wandb.mode=offline"
    return [warn(what, f"{version}, not logged in to {host}", todo)]
