"""Plans: of every preset, against published and counted numbers, and what is refused or left unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ibq_scale.cli.main import main
from ibq_scale.config.layers import preset_names, resolve
from ibq_scale.config.models import QuantizerConfig, TransformerConfig
from ibq_scale.config.run import ARRun
from ibq_scale.models.muon import newton_schulz_flops
from ibq_scale.models.transformer import Transformer
from ibq_scale.scaling.flops import META, ar_executed, ar_flops, tokenizer_formula
from ibq_scale.scaling.networks import transformer

# arXiv 2412.02692 and the authors' repository.
PUBLISHED = {"ar/b": 342e6, "ar/l": 649e6, "ar/xl": 1.1e9, "ar/xxl": 2.1e9}


def _plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", *words, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def _refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["plan", *words]) == 2
    return capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_planned(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The dry run: networks built, a micro-batch rehearsed, FLOPs counted, the DeepSpeed JSON read and completed."""
    plan = _plan(capsys, preset, "--device", "h100")
    assert plan["flops"]["executed"] >= 0.999 * plan["flops"]["per_image"] > 0
    assert plan["flops"]["per_step"] == pytest.approx(plan["flops"]["per_image"] * plan["global_batch"])
    assert plan["global_batch"] == plan["micro_batch"] * plan["accumulation"]
    assert plan["samples"] == plan["steps"] * plan["global_batch"]
    assert plan["memory"]["peak"] == max(plan["memory"]["passes"], plan["memory"]["step"])
    assert plan["memory"]["fits"] == (plan["memory"]["peak"] <= 80e9)
    assert plan["checkpoint_bytes"] > 12 * 0.9 * sum(plan["parameters"].values())
    timed = plan["time"]["images_per_s"] is not None
    assert timed == (plan["precision"] == "bf16")
    if preset.startswith("ar/"):
        run = resolve(preset).config
        assert isinstance(run, ARRun)
        with META:
            real = sum(p.numel() for p in Transformer(run.model).parameters())
        assert sum(plan["parameters"].values()) == real
        if preset in PUBLISHED:
            assert real == pytest.approx(PUBLISHED[preset], rel=0.03)


@pytest.mark.slow
def test_the_published_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(capsys, "tokenizer/ibq-16384")
    # With codebook, discriminator and LPIPS: what the authors' trainer counts.
    assert sum(plan["parameters"].values()) + plan["frozen"]["LPIPS"] == pytest.approx(128e6, rel=0.01)
    assert set(plan["parameters"]) == {"encoder", "decoder", "discriminator", "codebook"}
    # Counted before, on tensors without memory (docs/benchmarks.md). Norms without the kernels keep 1.44 GB.
    assert plan["memory"]["kept_per_image"] == pytest.approx(0.976e9, rel=0.02)


@pytest.mark.slow
def test_frozen_networks_are_planned_without_their_files(capsys: pytest.CaptureFixture[str]) -> None:
    """DINO is in memory once, in no optimizer, and its activations are on the generator's way back."""
    wide = ("tokenizer/tiny", "train.micro_batch=8")
    plain, plan = (_plan(capsys, *wide, *more) for more in ((), ("discriminator.kind=dino", "loss.features=dinov2")))
    assert plan["frozen"] == {"DINO": 21_665_664, "DINOv2": 22_056_192}
    # Five heads of 384 channels, with kernels of 1, 9 and 1.
    assert plan["parameters"]["discriminator"] == 5 * (384 * 384 * 10 + 2 * 3 * 384 + 384 + 1)
    lines = [{line["name"]: line["passes"] for line in p["memory"]["lines"]} for p in (plain, plan)]
    assert lines[1]["DINO, frozen"] == 4 * plan["frozen"]["DINO"]
    # The tokens of 12 blocks: norms, queries, keys, values, mixtures, projections and the MLP's wide layer, twice.
    kept = 4 * 8 * 197 * 384 * 12 * 12
    assert lines[1]["activations"] - lines[0]["activations"] > kept


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.depth=3", "model.width=96", "model.heads=3", "model.tokens=64"),
        ("model.kv_heads=2", "model.qk_norm=true"),
        ("model.conditioning=prefix", "model.codebook_size=4096"),
        ("model.conditioning=embedding", "model.condition_tokens=12", "model.condition_width=48", "model.order=random"),
    ],
)
def test_the_formula_is_what_is_counted(overrides: tuple[str, ...]) -> None:
    run = resolve("ar/tiny", overrides).config
    assert isinstance(run, ARRun)
    assert sum(ar_flops(run.model).values()) == ar_executed(run.model)
    parts = transformer(run).parts
    assert parts.get("order embedding") == (None if run.model.order == "raster" else 256 * 128)
    assert parts.get("condition embedding") == (128 * (48 + 2) + 48 if run.model.condition_tokens else None)


@pytest.mark.slow
def test_what_is_computed_again_is_done_and_not_needed(capsys: pytest.CaptureFixture[str]) -> None:
    plain = _plan(capsys, "ar/tiny")["flops"]
    again = _plan(capsys, "ar/tiny", "model.activation_checkpointing=full")["flops"]
    assert again["per_image"] == plain["per_image"] == plain["executed"]
    # A block's forward pass, less its last product, which nobody needs again.
    assert 1.2 < again["executed"] / plain["executed"] < 1.34


def test_the_formula_has_the_products_of_the_kind() -> None:
    said = {kind: tokenizer_formula(QuantizerConfig(kind=kind)) for kind in ("ibq", "vq")}
    assert (said["ibq"][-13:], said["vq"][-13:]) == (") 5 × 2·T·K·D", ") 1 × 2·T·K·D")
    of_lfq = tokenizer_formula(QuantizerConfig(kind="lfq", dim=4, codebook_size=16))
    assert of_lfq.endswith("(lfq) no products with codes")


@pytest.mark.slow
def test_an_unknown_gpu_gets_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(capsys, "ar/tiny", "train.precision=bf16", "--device", "mi300x")
    assert plan["time"]["hours"] is plan["memory"]["fits"] is plan["machine"]["peak_bf16"] is None
    assert "mi300x is not in the table" in plan["time"]["basis"]
    assert _plan(capsys, "ar/tiny", "--device", "mi300x", "--memory", "192")["memory"]["fits"] is True


@pytest.mark.slow
def test_time_follows_from_what_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("ar/b", "train.micro_batch=16", "--gpus", "8", "--nodes", "2", "--device", "h100")
    plan = _plan(capsys, *words, "--mfu", "0.3")
    seconds = plan["flops"]["per_image"] * plan["samples"] / (16 * 0.3 * 989.4e12)
    assert plan["time"]["hours"] == pytest.approx(seconds / 3600)
    assert plan["time"]["gpu_hours"] == pytest.approx(16 * seconds / 3600)
    assert plan["time"]["basis"].startswith("ASSUMED")


@pytest.mark.slow
def test_time_follows_from_what_was_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    per_image = _plan(capsys, "ar/tiny")["flops"]["per_image"]
    report = {"images_per_s": 100.0, "ranks": 2, "flops_per_image": per_image, "device": "NVIDIA H200"}
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(report))
    plan = _plan(capsys, "ar/tiny", "--measured", str(file), "--gpus", "2")
    assert plan["time"]["images_per_s"] == pytest.approx(100.0)
    assert "measured on NVIDIA H200" in plan["time"]["basis"]
    assert "another model" in _refused(capsys, "ar/b", "--measured", str(file))
    file.write_text("{}")
    assert "is no report" in _refused(capsys, "ar/tiny", "--measured", str(file))


@pytest.mark.slow
def test_what_training_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no multiple of micro_batch × ranks" in _refused(capsys, "ar/tiny", "--gpus", "5")
    assert "does not divide the 2 ranks" in _refused(capsys, "tokenizer/tiny", "codebook_group=3", "--gpus", "2")
    assert "did you mean" in _refused(capsys, "ar/tiny", "model.dept=3")
    assert "unknown key" in _refused(capsys, "ar/tiny", "deepspeed.overrides.zero_optimisation.stage=2")
    assert "--mfu" in _refused(capsys, "ar/tiny", "--mfu", "45")
    assert "--gpus" in _refused(capsys, "ar/tiny", "--gpus", "0")


@pytest.mark.slow
def test_muon_has_one_moment_and_iterations(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("ar/tiny", "model.width=64", "deepspeed.config=zero2", "train.global_batch=16", "--gpus", "2")
    adam, muon = (_plan(capsys, *words, f"optimizer.kind={kind}") for kind in ("adam", "muon"))
    model = resolve("ar/tiny", ["model.width=64"]).config.model
    assert isinstance(model, TransformerConfig)
    shapes = model.depth * [(64, 64), (64, 192), *3 * [(64, model.ffn_hidden)]]
    matrices = sum(m * n for m, n in shapes)
    assert adam["checkpoint_bytes"] - muon["checkpoint_bytes"] == 4 * matrices
    moments = [
        next(line["step"] for line in plan["memory"]["lines"] if "moments" in line["name"]) for plan in (adam, muon)
    ]
    assert moments[0] - moments[1] == pytest.approx(4 * matrices / 2, abs=64)
    expected = sum(newton_schulz_flops(*shape) for shape in shapes)
    assert adam["flops"] | {"optimizer": expected / 16} == muon["flops"]


@pytest.mark.slow
def test_more_gpus_share_the_states(capsys: pytest.CaptureFixture[str]) -> None:
    def lines(gpus: int) -> dict[str, int]:
        plan = _plan(capsys, "ar/tiny", f"train.global_batch={8 * gpus}", "deepspeed.config=zero3", "--gpus", str(gpus))
        return {line["name"]: line["passes"] for line in plan["memory"]["lines"]}

    two, eight = lines(2), lines(8)
    assert eight["Adam's moments"] == pytest.approx(two["Adam's moments"] / 4, rel=0.01)
    assert eight["gradients"] == pytest.approx(two["gradients"] / 4, rel=0.01)
    assert eight["activations"] == two["activations"]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_fp8_that_is_not_compiled_is_noted(compiled: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("ar/tiny", "train.precision=bf16", "model.fp8=true", f"model.compile={compiled}", "--device", "h100")
    assert main(["plan", *words]) == 0
    assert ("is slower than bf16" in capsys.readouterr().out) == (compiled == "false")


@pytest.mark.slow
def test_offloading_moves_states_to_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("ar/tiny", "train.precision=bf16")
    here = _plan(capsys, *words, "deepspeed.config=zero2")["memory"]
    there = _plan(capsys, *words, "deepspeed.config=zero2_offload")["memory"]
    assert here["host"] == 0
    assert there["host"] >= here["step"] - there["step"] > 0


@pytest.mark.slow
def test_a_validation_holds_the_averaged_weights_whole(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("ar/tiny", "train.precision=bf16", "deepspeed.config=zero3", "train.global_batch=64", "--gpus", "8")
    without = _plan(capsys, *words)
    memory = _plan(capsys, *words, "validation.data=/data/held-out")["memory"]
    assert without["memory"]["validation"] == 0
    states = sum(line["step"] for line in memory["lines"] if line["name"] != "optimizer's scratch")
    assert memory["validation"] == states + 2 * sum(without["parameters"].values())
    assert memory["peak"] == max(memory["passes"], memory["step"], memory["validation"])
    tokenizer = _plan(capsys, "tokenizer/tiny", "validation.data=/data/held-out", "data.aspects=[16:9,1:1]")
    assert any("steps of 64 × 64, 84 × 48 pixels, none with more memory" in note for note in tokenizer["notes"])
    generator = sum(n for part, n in tokenizer["parameters"].items() if part != "discriminator")
    states = sum(line["step"] for line in tokenizer["memory"]["lines"] if line["name"] != "optimizer's scratch")
    assert tokenizer["memory"]["validation"] == states + 4 * generator


@pytest.mark.slow
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "ar/tiny", "train.precision=bf16", "--device", "l4", "--memory", "0.5"]) == 0
    said = capsys.readouterr().out
    for words in ("1.743 M", "AdaLN 2·E·(6L + 2)·E", "Adam's moments", "DOES NOT FIT", "ASSUMED: 45 %", "checkpoint"):
        assert words in said
    # What CUDA takes alone is more than that.
    assert "no switch, and no two of them, make it fit" in said


@pytest.mark.slow
def test_the_stream_of_a_set_that_is_named(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["train.micro_batch=2", "--samples", "1281167", "--bytes", "141e9", "--nodes", "8"]
    assert main(["plan", "ar/tiny", *sizes]) == 0
    line = capsys.readouterr().out.rpartition("\ndata ")[2]
    assert "order 2: 8 lanes, windows of 4 shards; 0.34 GB in use a node, 50.00 GB of cache" in line
    assert main(["plan", "tokenizer/tiny", "data.lanes=null", "--data", dataset, "--json"]) == 0
    stream = json.loads(capsys.readouterr().out)["data"]
    assert stream["layout"] == [2, 128, 4]
    assert stream["working_set"] == stream["bytes"] == sum(path.stat().st_size for path in Path(dataset).glob("*.tar"))
    assert main(["plan", "ar/tiny", "--samples", "5"]) == 2
