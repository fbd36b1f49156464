"""Trained models on disk, and loading them in three lines of Python, without DeepSpeed.

A model directory holds ``config.json``, ``model.safetensors`` and, for tokenizers, the codebook in one or several files
by rows. `path` arguments accept such a directory, a training checkpoint, or a run directory (newest checkpoint).
`load_tokenizer`, `load_ar` and `load_model` also fetch ``hf://OWNER/NAME``. In a checkpoint the directory is
``model/``, and its config refers to the ranks' pieces instead of ``model.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ibq_scale.checkpoint.pieces import PieceReader
from ibq_scale.checkpoint.reading import MANIFEST, Checkpoint, read_checkpoint, verify, whole_checkpoints
from ibq_scale.config.models import AutoencoderConfig, QuantizerConfig, TransformerConfig
from ibq_scale.documents import read_json, require_regular
from ibq_scale.errors import UserError
from ibq_scale.models.autoencoder import Autoencoder, image_of, tokens_of
from ibq_scale.models.initial import Values
from ibq_scale.models.sampling import GuidanceSchedule, SamplingSettings, generate
from ibq_scale.models.transformer import Transformer
from ibq_scale.names import file_name, is_inside
from ibq_scale.pretrained.hub import PREFIX, fetch
from ibq_scale.pretrained.strict import fill_strictly, require_fit, require_layers
from ibq_scale.quantize.kinds import KINDS
from ibq_scale.quantize.quantizer import encode, lookup

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CODEBOOK = "config.json", "model.safetensors", "codebook"
Kind = Literal["tokenizer", "ar"]
S = TypeVar("S", bound=BaseModel)


class InCheckpoint(NamedTuple):
    """Weights in a checkpoint's `folder`: the vectors `vectors` + `module` + NAME in its pieces."""

    folder: str
    vectors: str = ""
    module: str = ""


class Tokenizer(nn.Module):
    """Images to codes and back. `codebook_KD` is a buffer, fp32."""

    def __init__(self, model: AutoencoderConfig, quantizer: QuantizerConfig) -> None:
        super().__init__()
        self.model_config = model
        self.quantizer_config = quantizer
        self.autoencoder = Autoencoder(model, quantizer.dim)
        self.codebook_KD: Tensor
        self.register_buffer("codebook_KD", torch.zeros(quantizer.codebook_size, quantizer.dim))
        self.eval().requires_grad_(False)

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        return self.model_config.downsampling

    def encode(self, images: Tensor) -> Tensor:
        """Float images (B, 3, H, W) in [-1, 1] → codes int64 (B, h, w).

        H and W are multiples of the downsampling. ValueError for other sizes and shapes.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        b, _, height, width = images.shape
        if height % self.downsampling or width % self.downsampling or not height or not width:
            raise ValueError(f"image sides {height} × {width} must be multiples of {self.downsampling}")
        z_ND = tokens_of(self.autoencoder.encode(images.to(self.codebook_KD.device)))
        codes_N = encode(z_ND, self.codebook_KD, self.quantizer_config)
        return codes_N.view(b, height // self.downsampling, width // self.downsampling)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 (B, h, w) of any h and w → float images (B, 3, H, W), about [-1, 1] and not clamped.

        Raises ValueError for other shapes.
        """
        if codes.ndim != 3:
            raise ValueError(f"codes must be (B, h, w), got {tuple(codes.shape)}")
        b, h, w = codes.shape
        flat = codes.to(self.codebook_KD.device).flatten()
        codes_ND = lookup(flat, self.codebook_KD, settings=self.quantizer_config)
        z_BDhw = image_of(codes_ND, torch.Size((b, self.codebook_KD.shape[1], h, w)))
        return self.autoencoder.decode(z_BDhw).float()

    def reconstruct(self, images: Tensor) -> Tensor:
        """`decode(encode(images))`."""
        return self.decode(self.encode(images))

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the sizes and all weights, the stamp of code shards."""
        digest = hashlib.sha256()
        # Settings of the computation do not belong to the model's identity.
        model = self.model_config.model_dump(mode="json", exclude={"activation_checkpointing", "compile"})
        settings = self.quantizer_config
        sizes = [model, settings.kind, *(["l2_normalize"] if settings.l2_normalize else [])]
        digest.update(json.dumps(sizes, sort_keys=True).encode())
        _add_weights(digest, self)
        return digest.hexdigest()


class ARModel(nn.Module):
    """The transformer for inference: logits and samples."""

    def __init__(self, config: TransformerConfig, tokenizer: str | None) -> None:
        super().__init__()
        self.transformer = Transformer(config)
        self.config = config
        self.tokenizer_hash = tokenizer
        """Hash of the tokenizer of its training codes, if known."""
        self.path = ""
        """Directory of the model."""
        self.eval().requires_grad_(False)

    @property
    def hash(self) -> str:
        """sha256 (hex) of the architecture and all current weights."""
        digest = hashlib.sha256(json.dumps(self.config.architecture().model_dump(mode="json"), sort_keys=True).encode())
        _add_weights(digest, self)
        return digest.hexdigest()

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Codes int64 (B, T), labels int64 (B,) → logits (B, T, V). ``logits[:, t]`` is for code t."""
        logits: Tensor = self.transformer(codes, labels)
        return logits

    def generate(
        self,
        labels: Tensor,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        seed: int = 0,
        ids: Tensor | None = None,
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_power: float = 1.0,
    ) -> Tensor:
        """Codes int64 (B, T) in raster order. See `models.sampling.Sampler`."""
        schedule = (guidance_schedule, guidance_power)
        settings = SamplingSettings(guidance, temperature, top_k, top_p, greedy, seed, *schedule)
        return generate(self.transformer, labels, settings, ids)


def _add_weights(digest: hashlib._Hash, model: nn.Module) -> None:
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu", check_hashes: bool = True) -> Tokenizer:
    """Loads a tokenizer. UserError if it is missing, damaged, or another kind of model.

    `check_hashes`: first compare the files of a checkpoint with its manifest.
    """
    folder, config = _read_config(_local(path), "tokenizer", check_hashes)
    model = _section(AutoencoderConfig, config, "model", folder)
    quantizer = _section(QuantizerConfig, config, "quantizer", folder)
    weights = _weights(folder, config)
    tensors = {f"autoencoder.{k}": v for k, v in weights.items()} | {"codebook_KD": _codebook(folder)}
    return fill_tokenizer(model, quantizer, tensors, folder).to(device)


def fill_tokenizer(
    model: AutoencoderConfig, quantizer: QuantizerConfig, tensors: Mapping[str, Tensor], where: Path
) -> Tokenizer:
    """The tokenizer with these weights, fp32. UserError for weights of other sizes, before any allocation."""
    require_layers(tensors, layers_of(model, r"autoencoder\."), str(where))
    with torch.device("meta"):
        tokenizer = Tokenizer(model, quantizer)
    fill_strictly(tokenizer, tensors, where, torch.float32)
    return tokenizer


def load_ar(path: str | Path, device: torch.device | str = "cpu", check_hashes: bool = True) -> ARModel:
    """Loads a transformer. `check_hashes` and UserError as `load_tokenizer`."""
    folder, config = _read_config(_local(path), "ar", check_hashes)
    sizes = _section(TransformerConfig, config, "model", folder)
    tensors = {f"transformer.{k}": v for k, v in _weights(folder, config).items()}
    model = fill_ar(sizes, config.get("tokenizer"), tensors, folder)
    model.path = str(folder.resolve())
    return model.to(device)


def layers_of(model: AutoencoderConfig, prefix: str = "") -> dict[str, int]:
    """Numbers of layers by pattern of names, for `require_layers`."""
    return {
        prefix + r"encoder\.down\.(\d+)\.": len(model.channel_multipliers),
        prefix + r"encoder\.down\.0\.block\.(\d+)\.": model.res_blocks,
    }


def fill_ar(sizes: TransformerConfig, tokenizer: str | None, tensors: Mapping[str, Tensor], where: Path) -> ARModel:
    """The transformer with these weights. UserError for weights of other sizes, before any allocation."""
    require_layers(tensors, {r"transformer\.blocks\.(\d+)\.": sizes.depth}, str(where))
    with torch.device("meta"):
        model = ARModel(sizes, tokenizer)
    fill_strictly(model, tensors, where)
    return model


def start_from(path: str, network: Autoencoder) -> None:
    """Fills a network for further training with the weights at `path`. UserError for other sizes."""
    folder, config = _read_config(Path(path), "tokenizer")
    fill_strictly(network, _weights(folder, config), folder)


def stored(path: str, network: Transformer) -> Values:
    """The weights at `path`, read on demand. UserError for other sizes than `network`."""
    folder, config = _read_config(Path(path), "ar")
    if "weights" in config:
        return _stored_in_pieces(folder, _place(config, folder), network)
    try:
        require_regular(folder / WEIGHTS)
        file: Any = safe_open(folder / WEIGHTS, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(f"cannot read {folder / WEIGHTS}: {e}") from None
    found = {name: torch.empty(s.get_shape(), device="meta") for name, s in slices.items()}
    require_fit(network.state_dict(), found, str(folder))

    def values(name: str, start: int, length: int) -> Tensor:
        row = found[name][0].numel()
        first, end = start // row, -(-(start + length) // row)
        rows: Tensor = slices[name][first:end]
        return rows.flatten()[start - first * row :][:length]

    return values


def _stored_in_pieces(folder: Path, place: InCheckpoint, network: Transformer) -> Values:
    reader = PieceReader(folder.parent / place.folder)
    found = {name: torch.empty(shape, device="meta") for name, shape in reader.shapes.items()}
    require_fit(network.state_dict(), found, str(folder))

    def values(name: str, start: int, length: int) -> Tensor:
        out = torch.empty(length)
        reader.read(f"{place.vectors}{name}", start, out)
        return out

    return values


def codebook_to_start_from(path: str, quantizer: QuantizerConfig) -> Tensor:
    """The codes (K, D), fp32, of the tokenizer at `path`. UserError if they do not match `quantizer`."""
    folder, config = _read_config(Path(path), "tokenizer")
    there = _section(QuantizerConfig, config, "quantizer", folder)
    if KINDS[there.kind].learns == "layer":
        raise UserError(f"init={path}: an export of {there.kind} has the final codes, but not the layer behind them")
    for key in ("kind", "codebook_size", "dim", "levels", "l2_normalize"):
        found, wanted = getattr(there, key), getattr(quantizer, key)
        if found != wanted:
            raise UserError(
                f"init={path} has quantizer.{key}={found}, this run {wanted}: set it, or start from another"
            )
    return _codebook(folder)


def load_model(path: str | Path) -> Tokenizer | ARModel:
    """Loads a model of either kind. UserError as `load_tokenizer`."""
    folder = model_directory(_local(path))
    return load_tokenizer(folder) if kind_of(folder) == "tokenizer" else load_ar(folder)


def kind_of(path: str | Path) -> Kind:
    """The kind of model at `path`, from its config alone. UserError as `load_tokenizer`."""
    kind: Kind = config_of(model_directory(_local(path)))["kind"]
    return kind


def _local(path: str | Path) -> Path:
    return fetch(path) if isinstance(path, str) and path.startswith(PREFIX) else Path(path)


def save_tokenizer(folder: Path, tokenizer: Tokenizer, source: Mapping[str, Any]) -> None:
    """Writes a tokenizer. `source`: its origin."""
    write_config(folder, "tokenizer", tokenizer.model_config, tokenizer.quantizer_config, source)
    save_file(_plain(tokenizer.autoencoder.state_dict()), folder / WEIGHTS)
    save_file(_plain({CODEBOOK: tokenizer.codebook_KD}), folder / codebook_part(0, 1))


def save_ar(folder: Path, model: ARModel, source: Mapping[str, Any]) -> None:
    """Writes a transformer. `source`: its origin."""
    write_config(folder, "ar", model.config.architecture(), None, source, model.tokenizer_hash)
    save_file(_plain(model.transformer.state_dict()), folder / WEIGHTS)


def refuse_overwrite(folder: Path) -> None:
    """UserError if a new model directory would replace existing files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty: give another --to, or remove it")


def write_config(
    folder: Path,
    kind: Kind,
    model: AutoencoderConfig | TransformerConfig,
    quantizer: QuantizerConfig | None,
    source: Mapping[str, Any],
    tokenizer: str | None = None,
) -> None:
    """Writes ``config.json``, from which `load_tokenizer` and `load_ar` build the model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(config_text(kind, model, quantizer, source, tokenizer), encoding="utf-8")


def config_text(
    kind: Kind,
    model: AutoencoderConfig | TransformerConfig,
    quantizer: QuantizerConfig | None,
    source: Mapping[str, Any],
    tokenizer: str | None = None,
    weights: InCheckpoint | None = None,
) -> str:
    """The content of ``config.json``. `weights`: their location if not ``model.safetensors`` beside it."""
    values: dict[str, Any] = {"format_version": FORMAT_VERSION, "kind": kind, "model": model.model_dump(mode="json")}
    if quantizer is not None:
        values["quantizer"] = quantizer.model_dump(mode="json")
    if tokenizer is not None:
        values["tokenizer"] = tokenizer
    if weights is not None:
        values["weights"] = weights._asdict()
    return json.dumps(values | {"source": dict(source)}, indent=2) + "\n"


def codebook_part(part: int, parts: int) -> str:
    """The file of one of `parts` consecutive pieces of the codebook, by rows. Its tensor is `CODEBOOK`."""
    return "codebook.safetensors" if parts == 1 else f"codebook-{part:05d}-of-{parts:05d}.safetensors"


def model_directory(path: Path) -> Path:
    """The model directory at, or under, `path`. UserError if there is none."""
    newest = [checkpoint.path / "model" for checkpoint in whole_checkpoints(path / "checkpoints")[-1:]]
    for candidate in [path, path / "model", *newest]:
        if (candidate / CONFIG).is_file():
            return candidate
    what = "does not exist" if not path.exists() else "holds no model (no config.json, no whole checkpoint)"
    raise UserError(f"{path} {what}: give an exported model, a checkpoint or a run directory")


def _read_config(path: Path, kind: Kind, check_hashes: bool = True) -> tuple[Path, dict[str, Any]]:
    folder = model_directory(path)
    config = config_of(folder)
    if config["kind"] != kind:
        raise UserError(f"{path} is {_A[config['kind']]}; {_A[kind]} is needed here")
    if check_hashes and (folder.parent / MANIFEST).is_file():
        _check_hashes(read_checkpoint(folder.parent), config, folder)
    return folder, config


def _check_hashes(checkpoint: Checkpoint, config: dict[str, Any], folder: Path) -> None:
    """UserError if a file of the model differs from the manifest's hash."""
    read = ("model/", f"{_place(config, folder).folder}/") if "weights" in config else ("model/",)
    faults = verify(checkpoint, [name for name in checkpoint.manifest["files"] if name.startswith(read)])
    if faults:
        raise UserError(f"{checkpoint.path} is damaged ({'; '.join(faults)}): use another checkpoint of the run")


def config_of(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG)
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{folder / CONFIG} is damaged: {e}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} is damaged: it is no JSON object")
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder} has model format {config.get('format_version')}, this program reads {FORMAT_VERSION}"
        )
    if config.get("kind") not in list(_A):
        raise UserError(f"{folder / CONFIG}: kind is {config.get('kind')!r:.50}, not one of {', '.join(_A)}")
    if not isinstance(config.get("tokenizer", ""), str) or not isinstance(config.get("source", {}), dict):
        raise UserError(f"{folder / CONFIG} is damaged: its tokenizer is no text, or its source no object")
    return config


def _section(kind: type[S], config: dict[str, Any], name: str, folder: Path) -> S:
    """A section of config.json. UserError if it is absent or invalid (another version, edited by hand)."""
    try:
        return kind.model_validate(config.get(name))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, (name, *first["loc"])))
        raise UserError(f"{folder / CONFIG}: {where}: {first['msg']}: the model's own version may read it") from None


def _place(config: dict[str, Any], folder: Path) -> InCheckpoint:
    """Location of the weights, inside the checkpoint of `folder` only."""
    try:
        place = InCheckpoint(**config["weights"])
        if not (isinstance(place.vectors, str) and isinstance(place.module, str)):
            raise ValueError("names of vectors are text")
        if not is_inside(folder.parent, file_name(place.folder)):
            raise ValueError(f"{place.folder} leads out of the checkpoint")
    except (TypeError, ValueError) as e:
        raise UserError(f"{folder / CONFIG}: weights: {e}") from None
    return place


def _weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    if "weights" not in config:
        return _read_tensors(folder / WEIGHTS)
    place = _place(config, folder)
    whole = PieceReader(folder.parent / place.folder).tensors(place.vectors)
    return {name.removeprefix(place.module): value for name, value in whole.items() if name.startswith(place.module)}


def _codebook(folder: Path) -> Tensor:
    paths = sorted(folder.glob("codebook*.safetensors"))
    parts = [tensors[CODEBOOK] for tensors in map(_read_tensors, paths) if CODEBOOK in tensors]
    try:
        return torch.cat(parts) if parts else torch.empty(0)
    except RuntimeError:
        raise UserError(f"{folder}: the parts of its codebook are of different widths") from None


_A = {"tokenizer": "a tokenizer", "ar": "an AR transformer"}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        require_regular(path)
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from None


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
