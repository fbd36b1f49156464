"""Quality of generated images: gFID, inception score, precision, recall, and comparison of such results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibq_scale.distributed.world import World
from ibq_scale.documents import json_object
from ibq_scale.errors import UserError
from ibq_scale.evaluate.conventions import DEFAULT, Convention, ConventionResult, chosen
from ibq_scale.evaluate.fid import Inception
from ibq_scale.evaluate.images import ImageSet, Size, open_images
from ibq_scale.evaluate.reference import UNSTAMPED, Reference, Stamp, load_reference
from ibq_scale.evaluate.results import write_result
from ibq_scale.evaluate.scores import NEIGHBOURS, SPLITS, gather_rows, inception_score, precision_and_recall
from ibq_scale.evaluate.suites import Scores, Sums, result_row
from ibq_scale.outputs import FACTS, GENERATION


@dataclass(frozen=True)
class GenerationReport:
    """Metrics of a set of 8-bit images.

    `inception_score`: mean over ten splits, with deviation `inception_score_std`. `precision`, `recall`: 0 to 1, of
    2048 features and three neighbours. Metrics are None if not measured, with the reason in `not_measured`.
    `conventions`: a row for each requested convention. The report's own metrics are those of the first.
    `reference_hash`: identity of the reference, ``unstamped:…`` for a file without a stamp. `reference_stamp`: its
    stamp. `resolution`: height and width. `sampled`: model, settings and job of images by ``sample``, None for others.
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
    conventions: list[ConventionResult]
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
    conventions: str | None = None,
) -> GenerationReport:
    """Measures the images at `samples` (or the first `limit`) against `reference`. Collective.

    The figures do not depend on the number of ranks. `size`: the centre crop of a prepared data set. `to`: a folder for
    the report (``generation.json``). `conventions`: names as for `chosen`. UserError if images, reference or weights
    are unusable or do not match.
    """
    begin = time.perf_counter()
    wanted = chosen(conventions)
    images = open_images(samples, size, limit)
    if images.count < 2:
        raise UserError(f"{samples} holds {images.count} image: a distance needs two at least")
    inception = Inception(world.device)
    real = load_reference(reference, inception, images.size, world, batch=batch, conventions=wanted)
    rows = _measure(images, real, inception, world, batch, wanted, reference)
    first = rows[0]
    if first.fid is None:
        raise UserError(f"{reference} does not serve --conventions {first.convention}: {first.not_measured['fid']}")
    seconds = time.perf_counter() - begin
    shared = {name: value for name, value in vars(first).items() if name in GenerationReport.__dataclass_fields__}
    report = GenerationReport(
        samples=samples,
        sampled=_sampled(Path(samples)),
        resolution=images.size,
        reference_hash=real.hash,
        reference_stamp=real.stamp,
        reference_features=0 if real.features_RF is None else len(real.features_RF),
        conventions=rows,
        seconds=seconds,
        images_per_s=images.count / seconds,
        **shared,
    )
    if to is not None and world.is_main:
        write_result(to / GENERATION, report)
    return report


def _sampled(folder: Path) -> dict[str, Any] | None:
    facts = json_object(folder / FACTS)
    names = ("model", "settings", "job")
    return {name: facts[name] for name in names} if facts.keys() >= set(names) else None


def _measure(
    images: ImageSet,
    real: Reference,
    inception: Inception,
    world: World,
    batch: int,
    conventions: Sequence[Convention],
    reference: str,
) -> list[ConventionResult]:
    sums = Sums(conventions, inception, world.device)
    indices, outputs = [], []
    for part in images.batches(world, batch):
        seen = sums.update(part.images_u8.to(world.device), part.weights_B)
        if seen is not None:
            held_B = part.weights_B > 0
            indices.append(part.indices_B[held_B])
            outputs.append(torch.cat([seen.features_BF, seen.logits_BC], dim=1)[held_B.to(world.device)])
    fake = sums.moments()
    scores: dict[str, Scores] = {}
    if outputs:
        outputs_NX = gather_rows(torch.cat(indices), torch.cat(outputs))
        features_NF, logits_NC = outputs_NX.tensor_split([inception.width], dim=1)
        manifolds = _manifolds(real.features_RF, features_NF, world)
        scores = {c.name: manifolds | _inception(logits_NC, c.split) for c in conventions if c.split is not None}
    origin = {
        "extractor_sha256": inception.sha256,
        "reference": reference,
        "reference_images": None if real.stamp is None else real.stamp.images,
        "images": images.count,
    }
    return [result_row(c, fake, real.moments, "8-bit", scores.get(c.name, {}), **origin) for c in conventions]


def _manifolds(real_RF: Tensor | None, fake_NF: Tensor, world: World) -> Scores:
    found: tuple[float | str, float | str]
    if real_RF is None:
        found = ("the reference holds neither features nor images",) * 2
    elif min(len(real_RF), len(fake_NF)) <= NEIGHBOURS:
        found = (f"they need more than {NEIGHBOURS} images on both sides",) * 2
    else:
        found = precision_and_recall(real_RF, fake_NF, world)
    return dict(zip(("precision", "recall"), found, strict=True))


def _inception(logits_NC: Tensor, split: int) -> Scores:
    if split == 0 and len(logits_NC) < SPLITS:
        return {"inception_score": f"it needs {SPLITS} images"}
    return dict(zip(("inception_score", "inception_score_std"), inception_score(logits_NC, split), strict=True))


def load_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Results of ``evaluate generation --json`` in files.

    UserError for another file, or for different references, extractors or conventions: such figures are not comparable.
    """
    results = [_result(path) for path in paths]
    ways = [result["conventions"][0]["convention"] if result.get("conventions") else DEFAULT for result in results]
    for path, way, result in zip(paths, ways, results, strict=True):
        if way != ways[0]:
            raise UserError(f"{paths[0]} and {path} are figures by {ways[0]} and {way}: they do not compare")
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
    result = json_object(path)
    if result.keys() >= {"fid", "reference_hash", "extractor_sha256", "resolution"}:
        return result
    what = "is no result of 'ibq-scale evaluate generation --json'" if path.exists() else "does not exist"
    raise UserError(f"{path} {what}")
