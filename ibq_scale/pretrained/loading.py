"""Trained models on disk, and loading them in three lines of Python, without DeepSpeed.

A model directory holds ``config.json``, ``model.safetensors`` and, for tokenizers, the codebook in one or several files
by rows. `path` arguments accept such a directory, a training checkpoint, or a run directory (newest checkpoint).
`load_tokenizer`, `load_ar` and `load_model` also fetch ``hf://OWNER/NAME``. In a checkpoint the directory is
``model/``, and its config refers to the ranks' pieces instead of ``model.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ibq_scale.checkpoint.pieces import PieceReader
from ibq_scale.checkpoint.reading import MANIFEST, read_checkpoint, verify, whole_checkpoints
from ibq_scale.config.models import AutoencoderConfig, QuantizerConfig, TransformerConfig
from ibq_scale.data.manifest import ConditionInfo
from ibq_scale.documents import read_json, require_regular
from ibq_scale.errors import UserError
from ibq_scale.models.autoencoder import Autoencoder
from ibq_scale.models.initial import Values
from ibq_scale.models.order import ORDER_EMBEDDING
from ibq_scale.models.transformer import Transformer
from ibq_scale.names import file_name, is_inside
from ibq_scale.pretrained.hub import local
from ibq_scale.pretrained.models import ARModel, Tokenizer
from ibq_scale.pretrained.strict import fill_strictly, require_fit, require_layers
from ibq_scale.quantize.kinds import KINDS

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CODEBOOK = "config.json", "model.safetensors", "codebook"
Kind = Literal["tokenizer", "ar"]
S = TypeVar("S", bound=BaseModel)


class InCheckpoint(NamedTuple):
    """Weights in a checkpoint's `folder`: the vectors `vectors` + `module` + NAME in its pieces."""

    folder: str
    vectors: str = ""
    module: str = ""


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu", check_hashes: bool = True) -> Tokenizer:
    """Loads a tokenizer. UserError if it is missing, damaged, or another kind of model.

    `check_hashes`: first compare the files of a checkpoint with its manifest.
    """
    folder, config = _read_config(local(path), "tokenizer", check_hashes)
    model = _section(AutoencoderConfig, config, "model", folder)
    quantizer = _section(QuantizerConfig, config, "quantizer", folder)
    weights = _weights(folder, config)
    tensors = {f"autoencoder.{k}": v for k, v in weights.items()} | {"codebook_KD": _codebook(folder)}
    require_layers(tensors, layers_of(model, r"autoencoder\."), str(folder))
    with torch.device("meta"):
        tokenizer = Tokenizer(model, quantizer)
    fill_strictly(tokenizer, tensors, folder, torch.float32)
    tokenizer.codes_of = tuple(config.get("source", {}).get("codes_of", ()))
    return tokenizer.to(device)


def load_ar(path: str | Path, device: torch.device | str = "cpu", check_hashes: bool = True) -> ARModel:
    """Loads a transformer. `check_hashes` and UserError as `load_tokenizer`."""
    folder, config = _read_config(local(path), "ar", check_hashes)
    sizes = _section(TransformerConfig, config, "model", folder)
    tensors = {f"transformer.{k}": v for k, v in _weights(folder, config).items()}
    embedding = tensors.pop(f"transformer.{ORDER_EMBEDDING}", None)
    if sizes.order != "raster" and embedding is not None:
        tensors[f"transformer.{ORDER_EMBEDDING}"] = embedding * float(config.get("order_scale", 1.0))
    encoder = _section(ConditionInfo, config, "encoder", folder) if "encoder" in config else None
    model = fill_ar(sizes, config.get("tokenizer"), tensors, folder, encoder)
    model.path = str(folder.resolve())
    return model.to(device)


def layers_of(model: AutoencoderConfig, prefix: str = "") -> dict[str, int]:
    """Numbers of layers by pattern of names, for `require_layers`."""
    return {
        prefix + r"encoder\.down\.(\d+)\.": len(model.channel_multipliers),
        prefix + r"encoder\.down\.0\.block\.(\d+)\.": model.res_blocks,
    }


def fill_ar(
    sizes: TransformerConfig,
    tokenizer: str | None,
    tensors: Mapping[str, Tensor],
    where: Path,
    encoder: ConditionInfo | None = None,
) -> ARModel:
    """The transformer with these weights. UserError for weights of other sizes, before any allocation."""
    require_layers(tensors, {r"transformer\.blocks\.(\d+)\.": sizes.depth}, str(where))
    with torch.device("meta"):
        model = ARModel(sizes, tokenizer, encoder)
    fill_strictly(model, tensors, where)
    return model


def start_from(path: str, network: Autoencoder) -> None:
    """Fills a network for further training with the weights at `path`. UserError for other sizes."""
    folder, config = _read_config(Path(path), "tokenizer")
    fill_strictly(network, _weights(folder, config), folder)


def stored(path: str, network: Transformer, first: Values) -> Values:
    """The weights at `path`, read on demand. UserError for other sizes than `network`.

    An order embedding is left aside if only one of the two has it. `first`: initial weights, for that of `network`.
    """
    folder, config = _read_config(Path(path), "ar")
    shapes, read = _pieces(folder, config) if "weights" in config else _mapped(folder / WEIGHTS)
    wanted = network.state_dict()
    there = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if ORDER_EMBEDDING not in wanted or ORDER_EMBEDDING not in there:
        wanted.pop(ORDER_EMBEDDING, None)
        there.pop(ORDER_EMBEDDING, None)
    require_fit(wanted, there, str(folder))
    return lambda name, start, length: (read if name in shapes else first)(name, start, length)


Shapes = Mapping[str, Sequence[int]]


def _mapped(file: Path) -> tuple[Shapes, Values]:
    try:
        require_regular(file)
        opened: Any = safe_open(file, framework="pt")
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(f"cannot read {file}: {e}") from None
    # A tensor is a view of the mapped file, so these elements alone are read.
    return shapes, lambda name, start, length: opened.get_tensor(name).flatten()[start : start + length]


def _pieces(folder: Path, config: dict[str, Any]) -> tuple[Shapes, Values]:
    place = _place(config, folder)
    reader = PieceReader(folder.parent / place.folder)

    def read(name: str, start: int, length: int) -> Tensor:
        out = torch.empty(length)
        reader.read(f"{place.vectors}{name}", start, out)
        return out

    return reader.shapes, read


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
    folder = model_directory(local(path))
    return load_tokenizer(folder) if kind_of(folder) == "tokenizer" else load_ar(folder)


def kind_of(path: str | Path) -> Kind:
    """The kind of model at `path`, from its config alone. UserError as `load_tokenizer`."""
    kind: Kind = config_of(model_directory(local(path)))["kind"]
    return kind


def save_tokenizer(folder: Path, tokenizer: Tokenizer, source: Mapping[str, Any]) -> None:
    _write_config(folder, config_text("tokenizer", tokenizer.model_config, tokenizer.quantizer_config, source))
    save_file(_plain(tokenizer.autoencoder.state_dict()), folder / WEIGHTS)
    save_file(_plain({CODEBOOK: tokenizer.codebook_KD}), folder / codebook_part(0, 1))


def save_ar(folder: Path, model: ARModel, source: Mapping[str, Any]) -> None:
    text = config_text("ar", model.config, None, source, model.tokenizer_hash, encoder=model.encoder)
    _write_config(folder, text)
    save_file(_plain(model.transformer.state_dict()), folder / WEIGHTS)


def refuse_overwrite(folder: Path) -> None:
    """UserError if a new model directory would replace existing files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty: give another --to, or remove it")


def _write_config(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def config_text(
    kind: Kind,
    model: AutoencoderConfig | TransformerConfig,
    quantizer: QuantizerConfig | None,
    source: Mapping[str, Any],
    tokenizer: str | None = None,
    weights: InCheckpoint | None = None,
    encoder: ConditionInfo | None = None,
    order_scale: float = 1.0,
) -> str:
    """The content of ``config.json``, from which `load_tokenizer` and `load_ar` build the model.

    `weights`: their location if not ``model.safetensors`` beside it. `encoder`: what made the vectors of its
    training, if any. `order_scale`: of the order embedding there, if any.
    """
    sizes = model.stored() if isinstance(model, TransformerConfig) else model.model_dump(mode="json")
    values = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "model": sizes,
        "quantizer": quantizer and quantizer.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "encoder": encoder and encoder.model_dump(mode="json"),
        "order_scale": order_scale if "order" in sizes and order_scale != 1.0 else None,
        "weights": weights and weights._asdict(),
        "source": dict(source),
    }
    return json.dumps({name: value for name, value in values.items() if value is not None}, indent=2) + "\n"


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
        checkpoint = read_checkpoint(folder.parent)
        read = ("model/", f"{_place(config, folder).folder}/") if "weights" in config else ("model/",)
        faults = verify(checkpoint, [name for name in checkpoint.manifest["files"] if name.startswith(read)])
        if faults:
            raise UserError(f"{checkpoint.path} is damaged ({'; '.join(faults)}): use another checkpoint of the run")
    return folder, config


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
