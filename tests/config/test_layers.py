"""Layers, misspelt keys, presets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ibq_scale.config.batch import accumulation_steps
from ibq_scale.config.layers import (
    flatten,
    load_resolved,
    preset_names,
    require_complete,
    resolve,
    schema_keys,
    to_yaml,
)
from ibq_scale.config.run import ARRun, TokenizerRun
from ibq_scale.errors import UserError
from ibq_scale.train.schedule import codebook_lr, lr_factor

IMAGENET = 1_281_167


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_survives_its_own_yaml(name: str, tmp_path: Path) -> None:
    config = resolve(name).config
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_resolved(path) == config


def test_a_run_s_own_config_is_read_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["optimizer.lr=1e-7", "data.train=s3://b/2026-01-01", "validation.data=null"]
    config = resolve("tokenizer/tiny", keys).config.model_copy(update={"name": "1e5"})
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    with monkeypatch.context() as patch:
        # It takes most of the time that `jobs` has for many runs.
        patch.setattr(OmegaConf, "load", None)
        assert load_resolved(path) == config
    path.write_text(path.read_text().replace("s3://b/2026-01-01", "s3://${name}/c").replace("1e5", "x"))
    assert "s3://x/c" in str(load_resolved(path).data.train)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot read"):
        load_resolved(path)


@pytest.mark.parametrize(
    ("name", "codes", "epochs"),
    [
        ("ibq-1024", 1024, 330),
        ("ibq-8192", 8192, 280),
        ("ibq-16384", 16384, 330),
        ("ibq-262144", 262144, 330),
    ],
)
def test_tokenizer_presets_hold_the_published_numbers(name: str, codes: int, epochs: int) -> None:
    run = resolve(name, task="tokenizer").config
    assert isinstance(run, TokenizerRun)
    assert (run.quantizer.codebook_size, run.quantizer.dim, run.model.downsampling) == (codes, 256, 16)
    assert run.train.samples == epochs * IMAGENET
    assert run.schedule.decay_at == (250 * IMAGENET, 300 * IMAGENET)
    assert (run.optimizer.lr, run.optimizer.betas, run.ema_decay) == (1e-4, (0.5, 0.9), 0.999)
    assert (run.loss.adversarial_weight, run.loss.entropy_weight, run.loss.lecam_weight) == (0.1, 0.05, 0.05)


@pytest.mark.parametrize(
    ("name", "resolution", "downsampling", "transformer", "keys"),
    [
        ("ibq-16384-f8", 256, 8, "b-512", []),
        ("ibq-16384-f32", 256, 32, "b", ["model.tokens=64"]),
        ("ibq-16384-512", 512, 16, "b-512", []),
    ],
)
def test_other_grids_have_a_transformer_and_else_the_published_recipe(
    name: str, resolution: int, downsampling: int, transformer: str, keys: list[str]
) -> None:
    run, published = (resolve(preset, task="tokenizer").config for preset in (name, "ibq-16384"))
    assert (run.model.resolution, run.model.downsampling) == (resolution, downsampling)
    for section in ("quantizer", "loss", "optimizer", "schedule", "train"):
        assert getattr(run, section) == getattr(published, section), section
    ar, b = resolve(transformer, keys, "ar").config, resolve("b", task="ar").config
    assert ar.model.tokens == run.model.tokens
    assert ar.model.codebook_size == run.quantizer.codebook_size
    assert ar.model.model_copy(update={"tokens": 256}) == b.model


def test_the_tokenizer_of_512_takes_the_weights_of_256() -> None:
    from ibq_scale.models.autoencoder import Autoencoder

    with torch.device("meta"):
        small, large = (
            Autoencoder(resolve(name, task="tokenizer").config.model, 256) for name in ("ibq-16384", "ibq-16384-512")
        )
    weights = [{name: x.shape for name, x in network.state_dict().items()} for network in (small, large)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("name", "codes"), [("stable-16384", 16384), ("stable-262144", 262144)])
def test_the_stable_presets_hold_what_is_told_of_the_recipe(name: str, codes: int) -> None:
    run = resolve(name, task="tokenizer").config
    assert isinstance(run, TokenizerRun)
    quantizer, optimizer, total = run.quantizer, run.optimizer, 40 * IMAGENET
    assert (quantizer.kind, quantizer.codebook_size, quantizer.straight_through, quantizer.region) == (
        "simvq",
        codes,
        "dynamic",
        True,
    )
    assert (run.train.global_batch, run.train.samples, optimizer.betas) == (128, total, (0.9, 0.95))
    shares = (0, 0.1, 0.37, 0.685, 1)
    rates = [optimizer.lr * lr_factor(run.schedule, round(share * total), total) for share in shares]
    assert rates == pytest.approx([5e-7, 1e-4, 1e-4, 5.05e-5, 1e-6])
    assert [codebook_lr(optimizer, run.schedule, round(share * total), total) for share in shares] == [1e-3] * 5


@pytest.mark.parametrize(
    ("name", "size", "hidden"),
    [
        ("b", (16, 16, 1024), 2816),
        ("l", (20, 20, 1280), 3584),
        ("xl", (24, 24, 1536), 4096),
        ("xxl", (30, 30, 1920), 5120),
    ],
)
def test_ar_presets_hold_the_published_sizes(name: str, size: tuple[int, int, int], hidden: int) -> None:
    run = resolve(name, task="ar").config
    assert isinstance(run, ARRun)
    assert (run.model.depth, run.model.heads, run.model.width) == size
    assert run.model.ffn_hidden == hidden
    assert (run.train.global_batch, run.optimizer.grad_clip, run.optimizer.betas) == (768, 1.0, (0.9, 0.95))


@pytest.mark.parametrize(
    ("name", "size", "hidden"),
    [
        ("llamagen-b", (12, 12, 768), 2048),
        ("llamagen-l", (24, 16, 1024), 2816),
        ("llamagen-xl", (36, 20, 1280), 3584),
        ("llamagen-xxl", (48, 24, 1536), 4096),
    ],
)
def test_llamagen_presets_hold_the_published_sizes(name: str, size: tuple[int, int, int], hidden: int) -> None:
    run = resolve(name, task="ar").config
    assert isinstance(run, ARRun)
    assert (run.model.conditioning, run.model.ffn_hidden) == ("prefix", hidden)
    assert (run.model.depth, run.model.heads, run.model.width) == size
    assert (run.train.global_batch, run.optimizer.lr, run.schedule.warmup_samples) == (256, 1e-4, 0)


@pytest.mark.parametrize(
    "override", ["model.kv_heads=3", "model.activation_checkpointing=true", "model.attention=flash"]
)
def test_a_transformer_that_cannot_be_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0].removeprefix("model.")):
        resolve("tiny", [override], "ar")


def test_layers_override_in_order_and_remember_who_set_what(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: tokenizer/ibq-1024\noptimizer: {lr: 5.0e-5}\ntrain: {global_batch: 64}\n")
    resolved = resolve(str(file), ["train.global_batch=32"])
    assert isinstance(resolved.config, TokenizerRun)
    assert resolved.config.train.global_batch == 32
    assert resolved.config.optimizer.lr == 5e-5
    assert resolved.config.optimizer.betas == (0.5, 0.9)
    assert resolved.origins["train.global_batch"] == "command line"
    assert resolved.origins["optimizer.lr"] == str(file)
    assert resolved.origins["optimizer.betas"] == "tokenizer/ibq-1024"


def test_steps_on_the_command_line_replace_the_presets_samples() -> None:
    config = resolve("ibq-1024", ["train.steps=10"], "tokenizer").config
    assert (config.train.samples, config.train.total_steps) == (None, 10)


def test_length_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="exactly one of"):
        resolve("ibq-1024", ["train.steps=10", "train.samples=1000"], "tokenizer")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optimizer.learning_rat=1", None),
        ("train.globl_batch=8", "train.global_batch"),
        ("modle.channels=8", "model"),
        ("codebook_size=8", "quantizer.codebook_size"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_right_one(override: str, nearest: str | None) -> None:
    with pytest.raises(UserError, match="unknown key") as caught:
        resolve("tiny", [override], "tokenizer")
    if nearest:
        assert f"did you mean '{nearest}'" in str(caught.value)


@pytest.mark.parametrize("override", ["train.global_batch=0", "train.precision=fp8", "optimizer.lr=-1", "noequals"])
def test_wrong_values_are_refused(override: str) -> None:
    with pytest.raises(UserError):
        resolve("tiny", [override], "tokenizer")


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'tokenizer/ibq-16384'"):
        resolve("ibq-16348", task="tokenizer")


def test_a_stage_s_own_presets_need_no_prefix() -> None:
    assert resolve("ibq-1024", task="tokenizer") == resolve("tokenizer/ibq-1024", task="tokenizer")


def test_a_config_of_the_other_stage_is_refused() -> None:
    with pytest.raises(UserError, match="task"):
        resolve("ar/b", task="tokenizer")


def test_a_preset_alone_leaves_the_data_open() -> None:
    with pytest.raises(UserError, match=r"data\.train"):
        require_complete(resolve("tiny", task="tokenizer").config)


@pytest.mark.parametrize(("world", "expected"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_is_what_is_left(world: int, expected: int) -> None:
    train = resolve("tiny", ["train.global_batch=32", "train.micro_batch=8"], "tokenizer").config.train
    assert accumulation_steps(train, world) == expected


def test_a_world_that_the_batch_does_not_divide_is_refused_with_a_size_that_fits() -> None:
    train = resolve("tiny", ["train.global_batch=24", "train.micro_batch=8"], "tokenizer").config.train
    with pytest.raises(UserError, match=r"train\.micro_batch=6 would"):
        accumulation_steps(train, 2)
    with pytest.raises(UserError, match="multiple of 5"):
        accumulation_steps(train, 5)


def test_schema_keys_are_the_keys_of_a_dump() -> None:
    config = resolve("tiny", task="tokenizer").config
    dumped = {k for k in flatten(config.model_dump()) if not k.startswith("deepspeed.overrides.")}
    assert dumped == set(schema_keys(TokenizerRun))


@pytest.mark.parametrize(
    "text", ["name: ${oc.env:SECRET}", "name: ${oc.env:ABSENT,x}", "fn: oc.env\nname: ${${fn}:SECRET}"]
)
def test_a_config_reads_no_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "run.yaml").write_text(f"preset: tokenizer/tiny\n{text}\n")
    with pytest.raises(UserError) as told:
        resolve(str(tmp_path / "run.yaml"), ["data.train=x"])
    assert "hunter2" not in str(told.value)


def test_an_override_interpolates_nothing() -> None:
    with pytest.raises(UserError, match="an override has no interpolation"):
        resolve("tokenizer/tiny", ["data.train=x", "name=${train.seed}"])


def test_ranges_of_steps_are_text_and_end_before_their_end(tmp_path: Path) -> None:
    """YAML 1.1 reads 10:20 as the number 620."""
    config = resolve("ar/tiny", ["data.train=x", "train.skip_steps=[10:20,30]"]).config
    assert [step for step in range(40) if config.train.skips(step)] == [*range(10, 20), 30]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_resolved(tmp_path / "config.yaml") == config
    (tmp_path / "mine.yaml").write_text("preset: ar/tiny\ntrain:\n  skip_steps: [1:11]\n")
    assert resolve(str(tmp_path / "mine.yaml")).config.train.skip_steps == ("1:11",)
    assert resolve("ar/tiny", ["train.skip_steps=7:9"]).config.train.skip_steps == ("7:9",)
    for wrong in ("5:5", "x", "0:3", "9:7"):
        with pytest.raises(UserError, match="no range of steps"):
            resolve("ar/tiny", [f"train.skip_steps=[{wrong}]"])
