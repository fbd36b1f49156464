"""Runs the stability bench: the trainer's codebook and quantizer on features of a frozen encoder."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from ibq_scale.config.layers import resolve
from ibq_scale.config.run import TokenizerRun
from ibq_scale.console import tell
from ibq_scale.data.manifest import load_manifest
from ibq_scale.data.sets import open_sets
from ibq_scale.data.stream import image_stream, to_float
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.experiments.plan import PRESET, Pictures
from ibq_scale.experiments.stability import EVERY, FOLDER, Curve, Sizes, Trial, load, save
from ibq_scale.experiments.tiles import prepare_tiles
from ibq_scale.models.autoencoder import Autoencoder, tokens_of
from ibq_scale.models.optimizers import adam
from ibq_scale.quantize.quantizer import quantize
from ibq_scale.quantize.usage import CodeUsage
from ibq_scale.train.codebook import ShardedCodebook

FEATURES = "features"
ENCODER_SEED = 0
# Features kept. A longer run goes over them again, in another order.
MOST_FEATURES = 1 << 18


def run_bench(pictures: Path | None, to: Path, chosen: Sequence[Trial], sizes: Sizes, workers: int) -> list[Curve]:
    """Measures each trial without a result under `to`, in `workers` processes. Returns the curves of all.

    `pictures`: a folder of photographs, or None for the ten of scikit-image and scikit-learn. UserError for a result of
    other sizes or pictures.
    """
    source: Pictures = "ten" if pictures is None else "photographs"
    url = prepare_tiles(source, pictures or to, to / "data" / source)["train"]
    encoder = resolve(PRESET, [f"data.train={url}", *sizes.more], "tokenizer").config
    assert isinstance(encoder, TokenizerRun)
    batch = encoder.train.global_batch * encoder.model.tokens
    if sizes.window % batch or sizes.steps * batch < sizes.window:
        raise UserError(f"{sizes.steps} steps of {batch} tokens have no window of {sizes.window}: take more steps")
    tokens = min(MOST_FEATURES, sizes.steps * batch)
    name = f"features-{load_manifest(url, 'images').hash[:8]}-{tokens}"
    file = to / FOLDER / f"{name}.safetensors"
    if not file.is_file():
        _write_features(encoder, tokens, file)
    missing = [trial for trial in chosen if not _is_there(to / FOLDER / trial.file, sizes, name)]
    for number, (trial, curve) in enumerate(_measured(missing, file, sizes, workers), 1):
        save([curve], to / FOLDER / trial.file)
        tell(f"[{number}/{len(missing)}] {trial.file.removesuffix('.json')}  {curve.usage[-1]:.1%} of the codes")
    return [load(to / FOLDER / trial.file)[0] for trial in chosen]


def measure(trial: Trial, features_TD: Tensor, features: str, sizes: Sizes, world: World) -> Curve:
    """Trains a codebook on features (T, D) drawn by the trial's seed, and follows its usage.

    `features` is their name in the result. Equal trials give equal curves.
    """
    run = trial.run(sizes.more)
    features_TD = in_dimensions(features_TD, run.quantizer.dim)
    codebook = ShardedCodebook(run, world)
    if trial.scale is not None:
        _start_at(codebook, trial.scale)
    batch = run.train.global_batch * run.model.tokens
    window: deque[Tensor] = deque(maxlen=sizes.window // batch)
    steps, usage = [], []
    started = time.process_time()
    for step, z_ND in enumerate(_batches(features_TD, batch, sizes.steps, trial.seed), 1):
        quantized = quantize(z_ND, codebook.codes(), run.quantizer, codebook.shards, age_K=codebook.age_K)
        loss = run.loss.quantization_weight * quantized.quantization_loss
        loss = loss + run.loss.entropy_weight * quantized.entropy_loss
        if loss.requires_grad:
            torch.autograd.backward(loss)
            codebook.step(run.optimizer.lr)
        window.append(quantized.indices_N)
        if len(window) == window.maxlen and (sizes.steps - step) % EVERY == 0:
            steps.append(step)
            seen = CodeUsage(trial.codes)
            seen.update(torch.cat(tuple(window)))
            usage.append(seen.usage)
    return Curve(
        name=trial.variant.name,
        codes=trial.codes,
        scale=trial.scale,
        seed=trial.seed,
        dim=run.quantizer.dim,
        lr=run.optimizer.lr,
        batch_tokens=batch,
        window=sizes.window,
        features=features,
        steps=steps,
        usage=usage,
        cpu_seconds=round(time.process_time() - started, 2),
        torch=torch.__version__,
    )


def frozen_features(run: TokenizerRun, tokens: int) -> Tensor:
    """Features (tokens, D) of `run.data`, fp32, centred, with root mean square 1, for codebooks alone.

    The preset's encoder is trained with its decoder and without a quantizer, so the features describe pictures and suit
    none of the quantizers more than another: `run.train.total_steps` steps of Adam on the mean absolute error.
    """
    torch.manual_seed(ENCODER_SEED)
    model = Autoencoder(run.model, run.quantizer.dim)
    optimizer = adam(model.parameters(), run.optimizer)
    batches = image_stream(
        open_sets(run.data, "images"),
        resolution=run.model.resolution,
        seed=ENCODER_SEED,
        rank=0,
        world_size=1,
        micro_batch=run.train.micro_batch,
        start=0,
    )
    for _ in range(run.train.total_steps):
        images = to_float(next(batches).images_u8)
        torch.autograd.backward(F.l1_loss(model.decode(model.encode(images)), images))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found: list[Tensor] = []
    with torch.no_grad():
        while sum(map(len, found)) < tokens:
            found.append(tokens_of(model.encode(to_float(next(batches).images_u8))))
    features_TD = torch.cat(found)[:tokens]
    features_TD -= features_TD.mean(dim=0)
    # One factor for all dimensions: the shape of the cloud stays.
    features_TD /= features_TD.square().mean().sqrt()
    return features_TD


def in_dimensions(features_TD: Tensor, dim: int) -> Tensor:
    """Features (T, dim) of variance 1 each: the first principal components. Unchanged if they have `dim` already.

    LFQ and FSQ have few dimensions, and their levels are made for values around 1.
    """
    if features_TD.shape[1] == dim:
        return features_TD
    covariance_DD = features_TD.T.double() @ features_TD.double() / len(features_TD)
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    # Ascending: the largest come last.
    largest = values_D.argsort(descending=True)[:dim]
    whitening_DE: Tensor = vectors_DD[:, largest] / values_D[largest].sqrt()
    return (features_TD @ whitening_DE.float()).contiguous()


@torch.no_grad()
def _start_at(codebook: ShardedCodebook, scale: float) -> None:
    """Scales the fresh codes to this root mean square. The features have 1.

    SimVQ's codes come from its basis and its layer's bias. Both are scaled, the layer's weight is as published.
    """
    factor = scale / codebook.codes().square().mean().sqrt()
    codebook.rows.mul_(factor)
    if codebook.projection is not None:
        codebook.projection.parameters["bias"].mul_(factor)


def _batches(features_TD: Tensor, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Batches (N, D) without replacement, in a new order for each pass."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(features_TD), generator=generator)])
        yield features_TD[order[:batch]]
        order = order[batch:]


def _measured(missing: Sequence[Trial], file: Path, sizes: Sizes, workers: int) -> Iterator[tuple[Trial, Curve]]:
    """Curves as they are finished. Every process has one thread, so their number does not change a result."""
    if workers < 2 or len(missing) < 2:
        for trial in missing:
            yield trial, _measure_alone(trial, file, sizes)
        return
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=get_context("spawn")) as pool:
        started = {pool.submit(_measure_alone, trial, file, sizes): trial for trial in missing}
        for done in as_completed(started):
            yield started[done], done.result()


def _measure_alone(trial: Trial, file: Path, sizes: Sizes) -> Curve:
    with _one_thread(), _alone() as world:
        return measure(trial, load_file(file)[FEATURES], file.stem, sizes, world)


def _write_features(encoder: TokenizerRun, tokens: int, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with _one_thread():
        save_file({FEATURES: frozen_features(encoder, tokens)}, partial)
    partial.replace(file)


@contextmanager
def _alone() -> Iterator[World]:
    """A world of one rank, without a port. SimVQ's layer sums its gradient over the default group."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield World(0, 1, 0, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@contextmanager
def _one_thread() -> Iterator[None]:
    """The number of threads changes the order of sums, and with it the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _is_there(path: Path, sizes: Sizes, features: str) -> bool:
    if not path.is_file():
        return False
    (curve,) = load(path)
    if (curve.features, curve.window, curve.steps[-1]) != (features, sizes.window, sizes.steps):
        raise UserError(f"{path} is of other sizes or pictures: remove it, or give another folder with --to")
    return True
