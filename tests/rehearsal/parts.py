"""What a run does besides its steps, on pretended GPUs: validation, checkpoints, samples, evaluation.

Each function here prepares one and returns what to watch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

Part = Callable[[], object]
BATCHES = 2


def image_batches(run: Any, side: int) -> Iterator[Any]:
    """Endless."""
    from ibq_scale.data.stream import ImageBatch

    count = run.train.micro_batch
    while True:
        labels, requests = torch.zeros(count, dtype=torch.int64), torch.zeros(count, 5, dtype=torch.int64)
        yield ImageBatch(torch.empty(count, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2), labels, requests)


def code_batches(run: Any) -> Iterator[Any]:
    """Endless."""
    from ibq_scale.data.stream import CodeBatch

    count = run.train.micro_batch
    while True:
        labels, requests = torch.zeros(count, dtype=torch.int64), torch.zeros(count, 5, dtype=torch.int64)
        yield CodeBatch(torch.zeros(count, run.model.tokens, dtype=torch.int64), labels, requests)


def _weighed(batches: Iterator[Any]) -> list[tuple[Any, Tensor]]:
    """As an evaluation's stream yields them."""
    found = [next(batches) for _ in range(BATCHES)]
    return [(batch, torch.ones(len(batch.labels))) for batch in found]


def _validation(task: Any, run: Any, world: Any) -> Part:
    from ibq_scale.train import validation

    if run.task == "ar":
        task.held_out = validation.HeldOutCodes.__new__(validation.HeldOutCodes)
        vars(validation)["evaluation_codes"] = lambda *_, **__: _weighed(code_batches(run))
    else:
        task.held_out = validation.HeldOutImages.__new__(validation.HeldOutImages)
        task.held_out.networks = _networks(world, "torch-fidelity")
        stream = _weighed(image_batches(run, run.model.resolution))
        vars(validation)["validation_images"] = lambda *_, **__: stream
    vars(task.held_out).update(run=run, world=world, sets=SimpleNamespace(config=run.data))
    return lambda: task.validate(run.train.total_steps, lambda: None)


def _checkpoint(task: Any, run: Any, world: Any) -> Part:
    """A rank's state in pieces, copied to the host."""
    from ibq_scale.checkpoint.files import HostCopies

    return lambda: HostCopies().take(task.state())


def _sampling(task: Any, run: Any, world: Any) -> Part:
    """`BATCHES` batches of images, with graphs captured in the first."""
    from ibq_scale.generate.chunks import Job
    from ibq_scale.generate.images import _make
    from ibq_scale.models.layout import compute_dtype
    from ibq_scale.models.sampling import SamplingSettings
    from ibq_scale.pretrained.models import ARModel

    with torch.device("meta"):
        ar = ARModel(run.model, None)
    ar.to(compute_dtype(run)).to_empty(device=world.device)
    tokenizer = _tokenizer("tokenizer/ibq-16384", world, {"codebook_size": run.model.codebook_size})
    batch, numbers = run.train.micro_batch, list(range(BATCHES * world.size))
    job = Job((0,) * batch * len(numbers), 1, batch, tokenizer.downsampling * run.model.grid, {})
    chunks: Any = SimpleNamespace(job=job, write=lambda *_: None)
    settings = SamplingSettings(guidance=2.0, top_k=100, top_p=0.9)
    return lambda: _make(ar, tokenizer, settings, chunks, numbers, world, ())


def _reconstruction(task: Any, run: Any, world: Any) -> Part:
    from ibq_scale.evaluate.reconstruction import measure

    tokenizer, networks = _tokenizer(run, world), _networks(world, "all")
    stream = _weighed(image_batches(run, run.model.resolution))
    return lambda: measure(tokenizer, networks, stream, world, "float")


def _generation(task: Any, run: Any, world: Any) -> Part:
    from ibq_scale.evaluate.conventions import chosen
    from ibq_scale.evaluate.generation import _measure
    from ibq_scale.evaluate.images import Part as Images
    from ibq_scale.evaluate.reference import measure_reference

    inception, wanted = _networks(world, "all").inception, chosen("all")
    assert inception is not None
    batches = _weighed(image_batches(run, 256))
    parts = [Images(batch.requests[:, 0], batch.images_u8, weights_B) for batch, weights_B in batches]
    count = world.size * sum(len(part.indices_B) for part in parts)
    images: Any = SimpleNamespace(
        name="images", count=count, size=(256, 256), manifest_hash="hash", batches=lambda *_: parts
    )

    def measured() -> object:
        real = measure_reference(images, inception, world, batch=1, features=count, conventions=wanted)
        return _measure(images, real, inception, world, 1, wanted, "images")

    return measured


PARTS: dict[str, Callable[[Any, Any, Any], Part]] = {
    "validation": _validation,
    "checkpoint": _checkpoint,
    "sampling": _sampling,
    "reconstruction": _reconstruction,
    "generation": _generation,
}


def _tokenizer(of: Any, world: Any, quantizer: dict[str, Any] | None = None) -> Any:
    from ibq_scale.config.layers import resolve
    from ibq_scale.pretrained.models import Tokenizer

    run = resolve(of, ["data.train=none"]).config if isinstance(of, str) else of
    with torch.device("meta"):
        tokenizer = Tokenizer(run.model, run.quantizer.model_copy(update=quantizer or {}))
    return tokenizer.to_empty(device=world.device)


def _networks(world: Any, conventions: str) -> Any:
    """Those of the metrics, without their files. Distances of moments are left out: they are numpy's."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from ibq_scale.evaluate import suites
    from ibq_scale.evaluate.conventions import chosen
    from ibq_scale.evaluate.fid import FEATURES, FeatureStatistics, Inception
    from ibq_scale.evaluate.reconstruction import Networks
    from ibq_scale.losses.perceptual import Perceptual

    networks = Networks(world.device, [], chosen(conventions))
    networks.names = ("lpips", "rfid")
    networks.perceptual = {"lpips": Perceptual("random", world.device)}
    networks.inception = Inception.__new__(Inception)
    with mock.patch.object(nn.Module, "load_state_dict"), mock.patch.object(torch, "load"):
        network: Any = FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(FEATURES), "logits_unbiased"], feature_extractor_weights_path="none"
        )
    vars(networks.inception).update(_network=network.to(world.device), sha256="0" * 64)

    def moments(self: FeatureStatistics) -> dict[str, Any]:
        self.sums.cpu()
        float(self.squares)
        return {"mu": np.zeros(self.width), "sigma": np.zeros((self.width, self.width))}

    vars_of: Any = FeatureStatistics
    vars_of.mean_and_covariance = moments
    vars(suites)["moments_distance"] = lambda *_: 0.0
    return networks
