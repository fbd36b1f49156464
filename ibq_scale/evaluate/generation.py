"""How good generated images are: gFID, inception score, precision, recall; and comparing such results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ibq_scale.distributed.world import World
from ibq_scale.documents import read_json
from ibq_scale.errors import UserError
from ibq_scale.evaluate.fid import FeatureStatistics, Inception, moments_distance
from ibq_scale.evaluate.gather import gather_rows
from ibq_scale.evaluate.images import ImageSet, Size, open_images
from ibq_scale.evaluate.names import GENERATION
from ibq_scale.evaluate.reference import UNSTAMPED, Reference, Stamp, load_reference
from ibq_scale.evaluate.results import write_result
from ibq_scale.evaluate.scores import NEIGHBOURS, SPLITS, inception_score, precision_and_recall
from ibq_scale.generate.names import FACTS


@dataclass(frozen=True)
class GenerationReport:
    """Measures of a set of 8-bit images.

    `inception_score` is the mean over ten splits, `inception_score_std` their deviation;
    `precision` and `recall` 0 to 1, of 2048 features and three neighbours. What could not be measured is None, and
    `not_measured` says why. `reference_hash` tells references apart, ``unstamped:…`` where a file does not say what it
    was computed from; `reference_stamp` is what it says. `resolution`: height and width. `sampled`: what ``sample``
    says of the images (model, settings, job), None for others.
    """

    samples: str
    sampled: dict[str, Any] | None
    images: int
    resolution: Size
    reference: str
    reference_hash: str
    reference_stamp: Stamp | None
    reference_features: int
    extractor_sha256: str
    fid: float
    inception_score: float | None
    inception_score_std: float | None
    precision: float | None
    recall: float | None
    not_measured: dict[str, str]
    seconds: float
    images_per_s: float


def evaluate_generation(
    samples: str,
    reference: str,
    world: World,
    *,
    batch: int,
    size: Size | None = None,
    limit: int | None = None,
    to: Path | None = None,
) -> GenerationReport:
    """Measures the images at `samples` (or the first `limit`) against `reference`. Collective.

    The figures do not depend on the number of ranks. `size` is the centre crop where samples are a prepared data set,
    `to` a folder for the report (``generation.json``). UserError where images, reference or weights cannot be used or
    do not fit each other.
    """
    begin = time.perf_counter()
    images = open_images(samples, size, limit)
    if images.count < 2:
        raise UserError(f"{samples} holds {images.count} image: a distance needs two at least")
    inception = Inception(world.device)
    real = load_reference(reference, inception, images.size, world, batch=batch)
    values = _measure(images, real, inception, world, batch)
    seconds = time.perf_counter() - begin
    report = GenerationReport(
        samples=samples,
        sampled=_sampled(Path(samples)),
        images=images.count,
        resolution=images.size,
        reference=reference,
        reference_hash=real.hash,
        reference_stamp=real.stamp,
        reference_features=0 if real.features_RF is None else len(real.features_RF),
        extractor_sha256=inception.sha256,
        seconds=seconds,
        images_per_s=images.count / seconds,
        **values,
    )
    if to is not None and world.is_main:
        write_result(to / GENERATION, report)
    return report


def _sampled(folder: Path) -> dict[str, Any] | None:
    try:
        facts = read_json(folder / FACTS)
        return {name: facts[name] for name in ("model", "settings", "job")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measure(images: ImageSet, real: Reference, inception: Inception, world: World, batch: int) -> dict[str, Any]:
    statistics = FeatureStatistics(inception.width, world.device)
    indices, features, logits = [], [], []
    for part in images.batches(world, batch):
        features_BF, logits_BC = inception.features_and_logits(part.images_u8.to(world.device))
        statistics.update(features_BF, part.weights_B)
        held = part.weights_B > 0
        indices.append(part.indices_B[held])
        features.append(features_BF[held.to(features_BF.device)])
        logits.append(logits_BC[held.to(logits_BC.device)])
    statistics.reduce()
    index_n = torch.cat(indices)
    values: dict[str, Any] = dict.fromkeys(("inception_score", "inception_score_std", "precision", "recall"))
    faults: dict[str, str] = {}
    if images.count >= SPLITS:
        logits_NC = gather_rows(index_n, torch.cat(logits))
        values["inception_score"], values["inception_score_std"] = inception_score(logits_NC)
    else:
        faults["inception_score"] = f"it needs {SPLITS} images"
    if real.features_RF is None:
        faults["precision"] = faults["recall"] = "the reference holds neither features nor images"
    elif min(len(real.features_RF), images.count) <= NEIGHBOURS:
        faults["precision"] = faults["recall"] = f"they need more than {NEIGHBOURS} images on both sides"
    else:
        features_NF = gather_rows(index_n, torch.cat(features))
        values["precision"], values["recall"] = precision_and_recall(real.features_RF, features_NF, world)
    fid = moments_distance(statistics.mean_and_covariance(), real.moments)
    return values | {"fid": fid, "not_measured": faults}


def load_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Results that ``evaluate generation --json`` printed to files. UserError where one is none, or where two were
    measured against different references or by different extractors: such figures do not compare.
    """
    results = [_result(path) for path in paths]
    for path, result in zip(paths[1:], results[1:], strict=True):
        for name, what in (("reference_hash", "reference"), ("extractor_sha256", "extractor"), ("resolution", "size")):
            if result[name] != results[0][name]:
                raise UserError(
                    f"{paths[0]} and {path} were measured against another {what} "
                    f"({_short(results[0][name])} and {_short(result[name])}): they do not compare"
                )
    return results


def _short(value: object) -> str:
    text = str(value)
    label = f"{UNSTAMPED}:"
    return text[: len(label) + 12] if text.startswith(label) else text[:12]


def _result(path: Path) -> dict[str, Any]:
    try:
        result = read_json(path)
        if {"fid", "reference_hash", "extractor_sha256", "resolution"} <= set(result):
            return dict(result)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, TypeError):
        pass
    raise UserError(f"{path} is no result of 'ibq-scale evaluate generation --json'")
