"""Pretrained weights of metrics and losses, from a local folder. Jobs never download.

``ibq-scale fetch-weights`` fills the folder on a node with internet, or from existing files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Literal

from ibq_scale.config.run import AnyRun, TokenizerRun
from ibq_scale.download import NoNetworkError, download
from ibq_scale.errors import UserError

State = Literal["there", "missing", "damaged", "unverified"]


@dataclass(frozen=True)
class WeightFile:
    """`file`: the published name, ending in the first digits of its sha256. `address`: of the file, or the
    ``module:attribute`` with the address in the package that reads the file.

    `sha256`: for a name without these digits. Empty: nobody has published a hash. `check` then tests the tensors of the
    first file, and its hash is recorded beside it and required ever after.
    """

    file: str
    what: str
    needed_for: str
    address: str
    sha256: str | None = None
    check: Callable[[Path], object] | None = None

    @property
    def url(self) -> str:
        return self.address if "://" in self.address else str(resolve_name(self.address))

    @property
    def sha256_prefix(self) -> str:
        """First digits of the required sha256: published, else recorded here, else empty."""
        if self.sha256 is None:
            return Path(self.file).stem.rpartition("-")[2]
        record = self.record
        return self.sha256 or (record.read_text(encoding="utf-8").split(" ")[0] if record.is_file() else "")

    @property
    def record(self) -> Path:
        """The recorded hash, in the format of sha256sum."""
        return weights_folder() / f"{self.file}.sha256"


def _check_dino(path: Path) -> None:
    from ibq_scale.losses.frozen_vit import PUBLISHED, read

    read(path, PUBLISHED["dino"])


FBAI = "https://dl.fbaipublicfiles.com"

SOURCES = {
    "vgg": WeightFile(
        "vgg16-397923af.pth",
        "torchvision's VGG16 (ImageNet)",
        "LPIPS, as loss (perceptual=vgg) and metric",
        "torchvision.models:VGG16_Weights.IMAGENET1K_V1.url",
    ),
    "alex": WeightFile(
        "alexnet-owt-7be5be79.pth",
        "torchvision's AlexNet (ImageNet)",
        "LPIPS, as loss (perceptual=alex) and metric",
        "torchvision.models:AlexNet_Weights.IMAGENET1K_V1.url",
    ),
    "inception": WeightFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "torch-fidelity's Inception v3",
        "FID, IS, precision, recall",
        "torch_fidelity.feature_extractor_inceptionv3:URL_INCEPTION_V3",
    ),
    "dino": WeightFile(
        "dino_deitsmall16_pretrain.pth",
        "DINO's ViT-S/16",
        "the discriminator (kind=dino)",
        f"{FBAI}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
        sha256="",
        check=_check_dino,
    ),
    "dinov2": WeightFile(
        "dinov2_vits14_pretrain.pth",
        "DINOv2's ViT-S/14",
        "the feature loss (features=dinov2)",
        f"{FBAI}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
        # As the package refiners records it (scripts/conversion), and others.
        sha256="b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    ),
}

# Weights of a tokenizer's validation metrics.
OF_METRICS = {"lpips": "vgg", "lpips_alex": "alex", "rfid": "inception"}


def files_of_run(config: AnyRun) -> list[str]:
    """Files required for a run to start: those of its loss and of its named metrics."""
    if not isinstance(config, TokenizerRun):
        return []
    metrics = config.validation.metrics if config.validation.data is not None else None
    names = [config.loss.perceptual, config.loss.features, *(OF_METRICS[metric] for metric in metrics or ())]
    if (config.discriminator.kind, config.discriminator.backbone) == ("dino", "published"):
        names.append("dino")
    return list(dict.fromkeys(SOURCES[name].file for name in names if name in SOURCES))


@dataclass(frozen=True)
class Status:
    """One file of the folder. `state` ``damaged``: the file exists, but its sha256 is not the published one.

    ``unverified``: no hash is published, and none is recorded here.
    """

    name: str
    path: str
    state: State
    bytes: int
    what: str
    needed_for: str


def weights_folder() -> Path:
    """$IBQ_SCALE_WEIGHTS, else ~/.cache/ibq-scale/weights."""
    return Path(os.environ.get("IBQ_SCALE_WEIGHTS") or Path.home() / ".cache/ibq-scale/weights")


def missing(file: str) -> str | None:
    """The fix for an absent file, in one line. None if it is there."""
    path = weights_folder() / file
    if path.is_file():
        return None
    name = next(name for name, source in SOURCES.items() if source.file == file)
    return (
        f"{file} is not in {path.parent}: run 'ibq-scale fetch-weights {name}' on a node with internet "
        f"for {SOURCES[name].what}"
    )


def weight_file(file: str) -> Path:
    """The path of a weight file. UserError with the fix if it is absent."""
    fault = missing(file)
    if fault is not None:
        raise UserError(f"{fault},\nor set IBQ_SCALE_WEIGHTS to the folder that holds it (jobs download nothing)")
    return weights_folder() / file


def verified(name: str) -> Path:
    """The path of a weight file with the required sha256. UserError with the fix otherwise."""
    path = weight_file(SOURCES[name].file)
    state = _status(name).state
    if state == "damaged":
        raise damaged(path)
    if state == "unverified":
        raise UserError(f"{path} has no recorded hash: 'ibq-scale fetch-weights {name}' checks the file and records it")
    return path


def damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged or another network's: 'ibq-scale fetch-weights' replaces it")


def status(names: Sequence[str]) -> list[Status]:
    """State of these files in the folder. Existing files are read and hashed."""
    return [_status(name) for name in names]


def fetch(names: Sequence[str], given: Path | None, say: Callable[[str], None]) -> list[Status]:
    """Fetches these files into the folder and verifies them, from `given` (a folder or a file) or by HTTP.

    Intact files stay. UserError if a file is not available. The files before it are then in place.
    """
    folder = weights_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make {folder} ({e.strerror}): set IBQ_SCALE_WEIGHTS to another folder") from None
    if given is not None and not given.exists():
        raise UserError(f"{given} does not exist: give --from a folder or a file")
    for name in names:
        state = _status(name).state
        if state == "unverified" and given is None:
            _record(SOURCES[name], folder / SOURCES[name].file)
            state = "there"
        if state == "there":
            say(f"{SOURCES[name].file} is there")
        elif given is not None:
            _take(SOURCES[name], given, folder)
            say(f"{SOURCES[name].file} taken from {given}")
        else:
            _download(SOURCES[name], folder, say)
    return status(names)


def _status(name: str) -> Status:
    source = SOURCES[name]
    path = weights_folder() / source.file
    state: State = "missing"
    if path.is_file():
        state = "unverified" if not source.sha256_prefix else "there" if _is(source, path) else "damaged"
    size = path.stat().st_size if state != "missing" else 0
    return Status(name, str(path), state, size, source.what, source.needed_for)


def _is(source: WeightFile, path: Path) -> bool:
    return _sha256(path).startswith(source.sha256_prefix)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


def _record(source: WeightFile, path: Path) -> None:
    """Checks the tensors of a file without a known hash and records its hash. UserError if they are others."""
    if source.sha256_prefix:
        return
    if source.check is not None:
        source.check(path)
    source.record.write_text(f"{_sha256(path)}  {source.file}\n", encoding="utf-8")


def _take(source: WeightFile, given: Path, folder: Path) -> None:
    path = given / source.file if given.is_dir() else given
    if not path.is_file():
        raise UserError(f"{given} does not hold {source.file} ({source.what})")
    if not _is(source, path):
        raise UserError(f"{path} is not {source.file}: its sha256 does not begin with {source.sha256_prefix}")
    partial = folder / f".{source.file}.{os.getpid()}.partial"
    try:
        shutil.copyfile(path, partial)
        _record(source, partial)
        partial.replace(folder / source.file)
    except OSError as e:
        raise UserError(f"cannot write {folder / source.file}: {e.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def _download(source: WeightFile, folder: Path, say: Callable[[str], None]) -> None:
    url = source.url
    say(f"{source.file} ← {url}")
    # Not by its name until the tensors are checked, for a file without a known hash.
    fetched = folder / f".{source.file}.{os.getpid()}.partial"
    try:
        download(url, fetched, source.sha256_prefix)
        _record(source, fetched)
        fetched.replace(folder / source.file)
    except NoNetworkError as e:
        raise UserError(
            f"{e}\nrun this on a node with internet, or give a folder that holds {source.file} with --from"
        ) from None
    finally:
        fetched.unlink(missing_ok=True)
