"""An exported folder computes the same in Hugging Face transformers, loaded by its own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ibq_scale.cli.main import main
from ibq_scale.config.models import TransformerConfig
from ibq_scale.errors import UserError
from ibq_scale.pretrained.loading import save_ar
from ibq_scale.pretrained.models import ARModel
from ibq_scale.pretrained.transformers_layout import CODE, export_transformers

CODES, CLASSES, TOKENS = 64, 3, 16


def _model(**sizes: Any) -> ARModel:
    model = ARModel(TransformerConfig(codebook_size=CODES, classes=CLASSES, tokens=TOKENS, depth=2, **sizes), None)
    g = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=g)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["prefix", "adaln"])
def test_logits_loss_and_codes_are_ours(conditioning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = _model(heads=2, kv_heads=1, width=32, qk_norm=True, conditioning=conditioning)
    save_ar(tmp_path / "ar", model, {})
    words = ["checkpoint", "export", str(tmp_path / "ar"), "--to", str(tmp_path / "hf"), "--format", "transformers"]
    assert main(words) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    codes = torch.randint(CODES, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 2, CLASSES])
    ids = torch.cat([CODES + labels[:, None], codes], dim=1)
    logits = model(codes, labels)
    torch.testing.assert_close(loaded(ids[:, :-1]).logits, logits, rtol=1e-6, atol=1e-5)
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(loaded(ids, labels=ids).loss, loss, rtol=1e-6, atol=1e-6)
    first, none = ids[:, :1], torch.full((3, 1), CODES + CLASSES)
    plain = loaded.generate(first, do_sample=False)
    assert torch.equal(plain[:, 1:], model.generate(labels, greedy=True))
    assert torch.equal(plain, loaded.generate(first, do_sample=False, use_cache=False))
    guided = loaded.generate(first, do_sample=False, guidance_scale=2.0, negative_prompt_ids=none)
    assert torch.equal(guided[:, 1:], model.generate(labels, greedy=True, guidance=2.0))
    assert not torch.equal(guided, plain)
    assert loaded.generate(first, num_return_sequences=2).shape == (6, 1 + TOKENS)
    with pytest.raises(ValueError, match="there is no padding"):
        loaded(ids, attention_mask=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="one class and 16 codes"):
        loaded(torch.cat([ids, codes], dim=1))


def test_a_folder_holds_sizes_weights_and_code(tmp_path: Path) -> None:
    save_ar(tmp_path / "ar", _model(heads=2, width=32, conditioning="prefix"), {})
    assert export_transformers(tmp_path / "ar", tmp_path / "hf") == "ar"
    files = {"README.md", "config.json", "generation_config.json", "model.safetensors", CODE.name}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == files
    assert (tmp_path / "hf" / CODE.name).read_text() == CODE.read_text()
    assert len(CODE.read_text().splitlines()) <= 200
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["codebook_size"], config["kv_heads"], config["ffn_hidden"]) == (CODES, 2, 256)
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["max_new_tokens"] == TOKENS
    assert f"{CODES} + torch.tensor([[label]])" in (tmp_path / "hf/README.md").read_text()
    with pytest.raises(UserError, match="is there already and not empty"):
        export_transformers(tmp_path / "ar", tmp_path / "hf")


def test_models_of_vectors_are_refused(tmp_path: Path) -> None:
    save_ar(
        tmp_path / "ar", _model(heads=2, width=32, conditioning="embedding", condition_tokens=4, condition_width=8), {}
    )
    with pytest.raises(UserError, match="conditioning=embedding: --layout transformers takes class-conditional models"):
        export_transformers(tmp_path / "ar", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
