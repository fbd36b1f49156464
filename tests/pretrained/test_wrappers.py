"""One's own checkpoints: read with the usual wrappers around the weights, and told of what is wrong with them."""

from __future__ import annotations

import json
import pathlib
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ibq_scale.cli.main import main
from ibq_scale.config.models import AutoencoderConfig, QuantizerConfig
from ibq_scale.errors import UserError
from ibq_scale.pretrained.loading import load_tokenizer, save_tokenizer
from ibq_scale.pretrained.models import Tokenizer
from ibq_scale.pretrained.published import CODEBOOK, SIZES, import_published, published_tokenizer

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> Tokenizer:
    torch.manual_seed(0)
    sizes = AutoencoderConfig(
        channels=32, channel_multipliers=(1, 2), res_blocks=1, attention_resolutions=(), resolution=32, z_channels=8
    )
    tokenizer = Tokenizer(sizes, QuantizerConfig(codebook_size=16, dim=8))
    for tensor in tokenizer.state_dict().values():
        tensor.normal_(std=0.1)
    return tokenizer


@pytest.fixture
def live(model: Tokenizer) -> State:
    return {k: v for k, v in published_tokenizer(model).items() if not k.startswith("model_ema")}


def _under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPERS: dict[str, tuple[Callable[[State], Any], str]] = {
    "nothing": (lambda s: s, ""),
    "Lightning": (lambda s: {"state_dict": s, "epoch": 3, "loops": {}, "lr_schedulers": [{}]}, ""),
    "DDP": (lambda s: {"state_dict": _under("module.", s)}, "module."),
    "DDP alone": (lambda s: _under("module.", s), "module."),
    "torch.compile": (lambda s: {"state_dict": _under("_orig_mod.", s)}, "_orig_mod."),
    "both": (lambda s: {"model": _under("module._orig_mod.", s)}, "'model', module., _orig_mod."),
    "parts compiled": (
        lambda s: {"model": {k.replace("encoder.", "encoder._orig_mod."): v for k, v in s.items()}}, "_orig_mod.",
    ),
    "FSDP": (lambda s: _under("_fsdp_wrapped_module.", s), "_fsdp_wrapped_module."),
    "model": (lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 1}, "'model'"),
    "model_state_dict": (lambda s: {"model_state_dict": s, "loss": 0.5}, "'model_state_dict'"),
    "DeepSpeed": (lambda s: {"module": s, "dp_world_size": 8}, "'module'"),
    "twice": (lambda s: {"model": {"state_dict": _under("module.", s)}}, "'model', module."),
    "a part of a larger model": (
        lambda s: {"state_dict": _under("tokenizer.", s) | {"head.weight": torch.ones(2)}}, "tokenizer.",
    ),
    "an ordered one": (lambda s: OrderedDict(_under("module.", s)), "module."),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off_and_named(tmp_path: Path, model: Tokenizer, live: State, name: str) -> None:
    wrap, named = WRAPPERS[name]
    content = wrap(live)
    if name != "DDP alone":
        configs = {"model": model.model_config, "quantizer": model.quantizer_config}
        sizes = {name: config.model_dump(mode="json") for name, config in configs.items()}
        content = {**content, SIZES: sizes} if "state_dict" in content else content
    torch.save(content, tmp_path / "own.ckpt")
    imported = import_published(tmp_path / "own.ckpt")
    assert imported.notes == ((f"read without its wrappers: {named}",) if named else ()) or named in imported.notes[0]
    assert isinstance(imported.model, Tokenizer)
    for key, tensor in model.state_dict().items():
        assert torch.equal(imported.model.state_dict()[key], tensor), key


HARMLESS: dict[str, Any] = {
    "a numpy scalar": np.float64(1.5),
    "a numpy integer": np.int64(3),
    "a numpy truth": np.bool_(True),
    "a numpy array": np.arange(4, dtype=np.float32),
    "a path": pathlib.PosixPath("/x/y"),
    "a pure path": pathlib.PurePosixPath("x"),
    "a Windows path": pathlib.PureWindowsPath("C:\\x"),
    "nested": {"callbacks": [{"best": np.float32(1), "dirpath": pathlib.PosixPath(".")}]},
    "a dtype": torch.bfloat16,
    "a size": torch.Size([1, 2]),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_values_beside_the_weights_are_read(tmp_path: Path, live: State, name: str) -> None:
    torch.save({"state_dict": live, "extra": HARMLESS[name]}, tmp_path / "own.ckpt")
    assert "extra" in import_published(tmp_path / "own.ckpt").left_aside


class _Planted:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_what_may_run_code_is_refused_and_its_owner_told_a_way(
    tmp_path: Path, live: State, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": live, "hparams": _Planted()}, tmp_path / "own.ckpt", pickle_module=pickle)
    with pytest.raises(
        UserError, match=r"running code .* is refused: .*torch\.load\(FILE, weights_only=False\)"
    ) as told:
        import_published(tmp_path / "own.ckpt")
    assert len(str(told.value).splitlines()) == 1
    assert "code ran" not in capsys.readouterr().out
    torch.save({"state_dict": live, "extra": defaultdict(dict, {"a": {}})}, tmp_path / "own.ckpt")
    with pytest.raises(UserError, match=r"torch\.save"):
        import_published(tmp_path / "own.ckpt")


def test_two_sets_under_two_names_are_refused(tmp_path: Path, live: State) -> None:
    torch.save(live | _under("module.", live), tmp_path / "own.ckpt")
    with pytest.raises(UserError, match="with and without module"):
        import_published(tmp_path / "own.ckpt")


def test_weights_that_are_not_finite_are_told(tmp_path: Path, live: State, capsys: pytest.CaptureFixture[str]) -> None:
    live = {k: v.clone() for k, v in live.items()}
    live[CODEBOOK][3, 2], live["encoder.conv_in.weight"][0] = float("nan"), float("inf")
    torch.save({"model": live}, tmp_path / "own.ckpt")
    assert main(["checkpoint", "import", str(tmp_path / "own.ckpt"), "--to", str(tmp_path / "to")]) == 0
    said = capsys.readouterr().out
    assert "WARNING: 2 of" in said
    assert CODEBOOK in said
    assert "without its wrappers: 'model'" in said


def test_a_checkpoint_of_nothing_known_says_what_it_has(tmp_path: Path) -> None:
    torch.save({"model": {"conv1.weight": torch.ones(1)}}, tmp_path / "own.ckpt")
    with pytest.raises(UserError, match=r"neither a tokenizer .*: it has conv1\.weight"):
        import_published(tmp_path / "own.ckpt")


# As the config.json of BAAI/Emu3.5-VisionTokenizer, of a small model.
EMU = {
    "model_type": "Emu3p5VisionVQ", "codebook_size": 16, "embed_dim": 8, "z_channels": 8, "in_channels": 3, "ch": 32,
    "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "resolution": 32,
}  # fmt: skip


@pytest.mark.parametrize("given", ["the folder", "the file", "shards"])
def test_the_layout_of_emus_tokenizer_is_imported(tmp_path: Path, model: Tokenizer, live: State, given: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(EMU))
    names = list(live)
    if given == "shards":
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({name: live[name].contiguous() for name in part}, tmp_path / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file({name: tensor.contiguous() for name, tensor in live.items()}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors" if given == "the file" else tmp_path
    assert main(["checkpoint", "import", str(path), "--to", str(tmp_path / "to")]) == 0
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(load_tokenizer(tmp_path / "to").encode(images), model.encode(images))


def test_a_model_goes_there_and_back(tmp_path: Path, model: Tokenizer) -> None:
    save_tokenizer(tmp_path / "own", model, {})
    words = ["checkpoint", "export", str(tmp_path / "own"), "--layout", "huggingface", "--to", str(tmp_path / "emu")]
    assert main(words) == 0
    config = json.loads((tmp_path / "emu/config.json").read_text())
    assert {key: config[key] for key in EMU} == EMU
    assert CODEBOOK in load_file(tmp_path / "emu/model.safetensors")
    imported = import_published(tmp_path / "emu")
    assert imported.left_aside == {}
    assert isinstance(imported.model, Tokenizer)
    assert imported.model.hash == model.hash
    assert main(words) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "Emu3VisionVQ"}, "model_type is 'Emu3VisionVQ'"),
        ({"ch": "x"}, "is no config of"),
        ({"double_z": True}, "double_z"),
        ({"codebook_size": 32}, "do not fit"),
    ],
)
def test_another_models_folder_is_refused(tmp_path: Path, live: State, change: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(EMU | change))
    save_file({name: tensor.contiguous() for name, tensor in live.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=words):
        import_published(tmp_path)
