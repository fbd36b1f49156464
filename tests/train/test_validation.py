"""Evaluations within training: of the averages, the same on any ranks, and training knows nothing of them."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from ibq_scale.checkpoint.files import TensorFile, write_all
from ibq_scale.checkpoint.reading import newest_or_this
from ibq_scale.config.layers import resolve
from ibq_scale.config.run import AnyRun, ARRun, TokenizerRun
from ibq_scale.data.prepare import prepare_images
from ibq_scale.data.sets import open_sets
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.evaluate import reconstruction
from ibq_scale.evaluate.reconstruction import evaluate_reconstruction
from ibq_scale.losses.perceptual import Perceptual
from ibq_scale.losses.weights import SOURCES
from ibq_scale.models.sampling import SamplingSettings, generate
from ibq_scale.pictures import image_grid
from ibq_scale.pretrained.loading import load_ar, load_tokenizer
from ibq_scale.train.sample_grid import CHUNK
from ibq_scale.train.validation import HeldOutImages
from tests import nursery
from tests.evaluate.stand_in import QuickInception
from tests.ranks import run_ranks
from tests.samples import SMALL_AR, write_codes, write_pictures
from tests.train.runs import ENDLESS, PATIENCE, launched, lines, wait_until

SMALL = (
    "model.channel_multipliers=[1,1]",
    "model.resolution=16",
    "model.attention_resolutions=[8]",
    "model.z_channels=8",
    "model.dropout=0.1",
    "quantizer.dim=8",
    "quantizer.codebook_size=32",
    "train.global_batch=8",
    "train.micro_batch=2",
    "data.workers=0",
)
STEPS = 3


class _RandomPerceptual(Perceptual):
    """LPIPS' layers over random features."""

    def __init__(self, net: str, device: torch.device) -> None:
        super().__init__("random", device)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prepared pictures that are not those of `dataset`."""
    root = tmp_path_factory.mktemp("training")
    write_pictures(root / "pictures", seed=1)
    prepare_images(root / "pictures", str(root / "data"), shard_bytes=8_000)
    return str(root / "data")


@pytest.fixture(scope="module")
def codes(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """To train on and to hold out; of a codebook and grid that `tokenizer_dir` can decode."""
    folders = [tmp_path_factory.mktemp(name) for name in ("codes", "held-out")]
    for seed, folder in enumerate(folders):
        write_codes(folder, seed=seed, tokenizer=load_tokenizer(tokenizer_dir).hash)
    return str(folders[0]), str(folders[1])


def tokenizer_run(data: str, held_out: str, *overrides: str) -> TokenizerRun:
    words = [f"data.train={data}", f"validation.data={held_out}", *SMALL, "validation.every=1", *overrides]
    run = resolve("tokenizer/tiny", words).config
    assert isinstance(run, TokenizerRun)
    return run


def ar_run(codes: tuple[str, str], tokenizer: Path, *overrides: str) -> ARRun:
    words = [f"data.train={codes[0]}", f"validation.data={codes[1]}", f"tokenizer={tokenizer}", *SMALL_AR]
    words += ["train.global_batch=8", "train.micro_batch=2", "validation.every=1", "ema_decay=0.9", *overrides]
    run = resolve("ar/tiny", words).config
    assert isinstance(run, ARRun)
    return run


def _task(run: AnyRun, world: World) -> Any:
    from ibq_scale.train.ar_task import ARTask
    from ibq_scale.train.tokenizer_task import TokenizerTask

    reconstruction.Perceptual = _RandomPerceptual
    reconstruction.Inception = QuickInception
    if isinstance(run, TokenizerRun):
        return TokenizerTask(run, world, open_sets(run.data, "images"))
    return ARTask(run, world, open_sets(run.data, "codes"))


def _random_states() -> list[bytes]:
    numbers = np.random.get_state()
    return [torch.get_rng_state().numpy().tobytes(), repr(random.getstate()).encode(), repr(numbers).encode()]


def _states(rank: int, world_size: int, runs: dict[str, AnyRun]) -> dict[str, list[dict[str, Any]]]:
    """This rank's whole state and last losses after some steps, by run; without and with validations."""
    world = World(rank, world_size, rank, torch.device("cpu"))
    results: dict[str, list[dict[str, Any]]] = {}
    for name, run in runs.items():
        for validate in (False, True):
            task = _task(run, world)
            batches, losses = task.batches(0), []
            for step in range(1, STEPS + 1):
                task.set_rates((step - 1) * 8)
                losses.append(float(task.train_step(batches).metrics["loss"]))
                before = _random_states()
                if validate:
                    assert task.validate(step, lambda: None).values
                assert _random_states() == before
            files = {f.path: f.tensors for f in task.state() if isinstance(f, TensorFile)}
            state = {
                f"{file}/{k}": v.detach().numpy().copy() for file, tensors in files.items() for k, v in tensors.items()
            }
            results.setdefault(name, []).append(state | {"losses": np.array(losses)})
    return results


@pytest.mark.slow
@pytest.mark.distributed
def test_training_is_the_same_to_the_last_bit(
    training: str, dataset: str, codes: tuple[str, str], tokenizer_dir: Path
) -> None:
    networks = "validation.metrics=[lpips,rfid]"
    runs: dict[str, AnyRun] = {
        "tokenizer, codebook over ranks": tokenizer_run(training, dataset, networks, "deepspeed.config=zero2"),
        "tokenizer, ZeRO-3": tokenizer_run(training, dataset, networks, "deepspeed.config=zero3", "codebook_group=1"),
        "transformer": ar_run(codes, tokenizer_dir, "train.precision=bf16"),
        "transformer, ZeRO-3": ar_run(codes, tokenizer_dir, "deepspeed.config=zero3"),
    }
    for rank in run_ranks(_states, 2, runs):
        for name, (without, validated) in rank.items():
            assert without.keys() == validated.keys()
            assert len(without) > 20
            for key, value in without.items():
                assert np.array_equal(value, validated[key]), f"{name}: {key}"


class Found(NamedTuple):
    """What one rank's validation gave, and for tokenizers what an evaluation of the same state's checkpoint gave."""

    values: dict[str, float]
    picture: bytes = b""
    evaluated: dict[str, float] | None = None


def _validate(rank: int, world_size: int, runs: dict[str, AnyRun], folder: str) -> dict[str, Found]:
    """Averages that are not the live weights; the state is left as a checkpoint, by run."""
    world = World(rank, world_size, rank, torch.device("cpu"))
    results = {}
    for name, run in runs.items():
        task, path = _task(run, world), Path(folder) / name
        for piece in task.ema.pieces():
            places = torch.arange(piece.start, piece.start + len(piece.values))
            piece.values.add_(0.1 * torch.sin(places * 1.7 + len(piece.name)))
        if isinstance(run, TokenizerRun):
            task.codebook.ema_rows.mul_(-1)
        write_all(task.state(), path)
        torch.distributed.barrier()
        values, pictures = task.validate(1, lambda: None)
        if isinstance(run, ARRun):
            results[name] = Found(dict(values), pictures["samples"].numpy().tobytes())
            continue
        reconstruction.missing = lambda file: None
        report = evaluate_reconstruction(path, run.validation.data, world, batch=2)
        results[name] = Found(dict(values), evaluated={key: getattr(report, key.split("_", 1)[1]) for key in values})
    return results


@pytest.fixture(scope="module")
def found(
    training: str,
    dataset: str,
    codes: tuple[str, str],
    tokenizer_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, list[Found]]]:
    """By run, what the ranks of 1, 2 and 4 found, on another ZeRO stage each; and where the last left checkpoints."""
    ar = ("validation.images=7", "validation.guidance=2", "validation.samples=11")
    results: dict[str, list[Found]] = {"tokenizer": [], "ar": []}
    for world_size, zero in ((1, 1), (2, 3), (4, 2)):
        stage, folder = f"deepspeed.config=zero{zero}", tmp_path_factory.mktemp("states")
        runs: dict[str, AnyRun] = {
            "tokenizer": tokenizer_run(training, dataset, stage, "validation.metrics=[lpips,rfid]"),
            "ar": ar_run(codes, tokenizer_dir, stage, *ar),
        }
        for rank in run_ranks(_validate, world_size, runs, str(folder)):
            for name in runs:
                results[name].append(rank[name])
    return folder, results


@pytest.mark.slow
@pytest.mark.distributed
def test_a_tokenizers_figures_are_those_of_its_checkpoint_on_any_ranks(
    found: tuple[Path, dict[str, list[Found]]],
) -> None:
    ranks = found[1]["tokenizer"]
    first = ranks[0].values
    assert first.keys() == {f"validation_{m}" for m in ("psnr", "ssim", "usage", "perplexity", "lpips", "rfid")}
    assert first["validation_rfid"] > 0
    for rank in ranks:
        assert rank.values == pytest.approx(first, rel=1e-9)
        assert rank.evaluated == pytest.approx(first, rel=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
def test_samples_are_those_of_the_checkpoint_on_any_ranks(
    found: tuple[Path, dict[str, list[Found]]], tokenizer_dir: Path
) -> None:
    """Seven pictures of three classes: one rank makes both chunks, four ranks make some twice."""
    folder, ranks = found[0], found[1]["ar"]
    assert len({rank.picture for rank in ranks}) == 1
    losses = [rank.values["validation_loss"] for rank in ranks]
    assert losses == pytest.approx([losses[0]] * 7, rel=1e-9)
    model, tokenizer = load_ar(folder / "ar").transformer, load_tokenizer(tokenizer_dir)
    labels, ids = [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 1, 0, 1, 1]
    settings, images = SamplingSettings(guidance=2.0), []
    for first in (0, CHUNK):
        batch = slice(first, first + CHUNK)
        drawn = generate(model, torch.tensor(labels[batch]), settings, torch.tensor(ids[batch]))
        images.append(tokenizer.decode(drawn.view(-1, 4, 4)))
    assert ranks[0].picture == image_grid(torch.cat(images)[:7], columns=3).numpy().tobytes()
    assert len({image.numpy().tobytes() for image in torch.cat(images)[:7]}) == 7


def _opened(rank: int, world_size: int, run: TokenizerRun, weights: str) -> tuple[str, ...]:
    import os

    os.environ["IBQ_SCALE_WEIGHTS"] = f"{weights}/{rank}"
    reconstruction.Perceptual = _RandomPerceptual
    world = World(rank, world_size, rank, torch.device("cpu"))
    try:
        return HeldOutImages(run, world, open_sets(run.data, "images")).networks.names
    except UserError as e:
        return ("refused", str(e))


@pytest.mark.slow
@pytest.mark.distributed
def test_weights_that_are_absent_show_at_the_start(training: str, dataset: str, tmp_path: Path) -> None:
    """What one of the ranks lacks none measures, for they would wait for it."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / SOURCES["vgg"].file).touch()
    assert run_ranks(_opened, 2, tokenizer_run(training, dataset), str(tmp_path)) == [(), ()]
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / SOURCES["vgg"].file).touch()
    assert run_ranks(_opened, 2, tokenizer_run(training, dataset), str(tmp_path)) == [("lpips",)] * 2
    [found] = run_ranks(_opened, 1, tokenizer_run(training, dataset, "validation.metrics=[rfid]"), str(tmp_path))
    assert found[0] == "refused"
    assert f"{SOURCES['inception'].file} is not in" in found[1]
    [found] = run_ranks(_opened, 1, tokenizer_run(dataset, dataset), str(tmp_path))
    assert "is what the run trains on: give images of its own" in found[1]


def _train(*words: str) -> str:
    done = nursery.run(["train", *words, "--ranks", "2"])
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def seen() -> Callable[[Path], dict[int, set[str]]]:
    def names(run: Path) -> dict[int, set[str]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: {name for name in line if name.startswith("validation_")} for line in lines}

    return names


@pytest.mark.slow
@pytest.mark.distributed
def test_runs_log_what_they_measure_and_leave_pictures(
    training: str, dataset: str, codes: tuple[str, str], tokenizer_dir: Path, tmp_path: Path, seen: Callable
) -> None:
    rhythm = ("validation.every=2", "train.steps=3", "train.log_every=1")
    words = (f"data.train={training}", f"validation.data={dataset}", f"out={tmp_path / 'tok'}", *SMALL, *rhythm)
    said = _train("tokenizer", "tiny", *words)
    assert said.count("validation does not measure rfid: weights-inception") == 1
    measured = {f"validation_{name}" for name in ("psnr", "ssim", "usage", "perplexity")}
    assert seen(tmp_path / "tok") == {1: set(), 2: measured, 3: measured}
    words = (f"data.train={codes[0]}", f"validation.data={codes[1]}", f"tokenizer={tokenizer_dir}", *SMALL_AR, *rhythm)
    _train("ar", "tiny", *words, f"out={tmp_path / 'ar'}", "train.global_batch=8", "train.micro_batch=2")
    assert seen(tmp_path / "ar") == {1: set(), 2: {"validation_loss"}, 3: {"validation_loss"}}
    pictures = sorted(path.name for path in (tmp_path / "ar" / "images").iterdir())
    assert pictures == ["samples-00000002.png", "samples-00000003.png"]
    with Image.open(tmp_path / "ar" / "images" / pictures[0]) as grid:
        assert grid.size == (4 * 16 + 3 * 2, 4 * 16 + 3 * 2)


@pytest.mark.slow
@pytest.mark.distributed
def test_after_a_signal_no_validation_begins(training: str, dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = (f"validation.data={dataset}", "validation.every=1", "validation.samples=8", *ENDLESS)
    with launched(training, run, *more) as process:
        wait_until(lambda: len(lines(run)) >= 2, process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(PATIENCE) == 75
    *before, last = lines(run)
    assert all("validation_psnr" in line for line in before)
    assert "validation_psnr" not in last
    assert newest_or_this(run).step == last["step"]
