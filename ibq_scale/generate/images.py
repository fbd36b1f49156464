"""Class-conditional images: codes from the transformer, pixels from the tokenizer, an ``.npz`` and a PNG grid.

A job is a list of images cut into chunks of one batch. Any rank or array task computes a chunk whole, in one shape, and
writes it to a file, so ranks, array tasks and restarts do not change a byte of the result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ibq_scale.data.progress import Progress
from ibq_scale.distributed.agree import by_rank_0, of_all_ranks
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.generate.chunks import Chunks, Job, is_finished
from ibq_scale.models.sampling import Sampler, SamplingSettings
from ibq_scale.pictures import to_uint8
from ibq_scale.pretrained.models import ARModel, Tokenizer

Part = tuple[int, int]
"""Task i of n of an array of jobs: chunks i, i + n, …"""


@dataclass(frozen=True)
class SampleReport:
    """The result of `sample`. Rates cover the new images (`images` − `reused_images`), with decoding.

    `complete`: every image and the files exist. Otherwise other parts of the array are missing. `images`: of this part.
    `job`: sha256 of all inputs of the images. `model`: directory of the transformer.
    """

    folder: str
    complete: bool
    images: int
    reused_images: int
    classes: list[int]
    per_class: int
    batch: int
    precision: str
    settings: SamplingSettings
    model: str
    tokenizer: str
    job: str
    seconds: float
    images_per_s: float
    tokens_per_s: float


def check_pair(ar: ARModel, tokenizer: Tokenizer) -> None:
    """UserError if the transformer was trained on codes of another tokenizer."""
    if ar.tokenizer_hash is not None and not tokenizer.has_codes_of(ar.tokenizer_hash):
        raise UserError(
            f"the transformer was trained on codes of tokenizer {ar.tokenizer_hash[:12]}…, this is "
            f"{tokenizer.hash[:12]}…: give the checkpoint that wrote its codes"
        )
    if ar.config.codebook_size != tokenizer.quantizer_config.codebook_size:
        raise UserError(
            f"the transformer has {ar.config.codebook_size} codes, the tokenizer "
            f"{tokenizer.quantizer_config.codebook_size}: they do not match"
        )


def sample(
    ar: ARModel,
    tokenizer: Tokenizer,
    classes: Sequence[int],
    per_class: int,
    settings: SamplingSettings,
    to: Path,
    world: World,
    *,
    batch: int,
    part: Part = (0, 1),
    captions: Sequence[str] = (),
) -> SampleReport:
    """Writes `per_class` images of each class: ``samples.npz`` (arr_0 uint8 (N, H, W, 3), arr_1 labels int64 (N,)),
    ``grid.png`` and ``samples.json``. Collective. With `captions`, `classes` are their numbers.

    Chunks of an earlier run of the same job are verified and kept. The part that finds all chunks writes the files.
    UserError for an unknown class, or for a tokenizer other than the transformer's.
    """
    begin = time.perf_counter()
    check_pair(ar, tokenizer)
    _check_asked(ar, classes, captions)
    precision = "bf16" if ar.transformer.head.weight.dtype == torch.bfloat16 else "fp32"

    def begun() -> tuple[Job, bool]:
        labels = tuple(label for label in classes for _ in range(per_class))
        depends: dict[str, Any] = {"transformer": ar.hash, "tokenizer": tokenizer.hash, "precision": precision}
        depends |= {"settings": asdict(settings)} | ({"captions": list(captions)} if captions else {})
        job = Job(labels, per_class, min(batch, len(labels)), ar.config.grid * tokenizer.downsampling, depends)
        return job, is_finished(to, job)

    job, finished = by_rank_0(world, begun)
    chunks = Chunks(to, job)
    numbers = list(range(job.chunks))[part[0] :: part[1]]
    reused, missing = (numbers, []) if finished else _find(chunks, numbers, world)
    _make(ar, tokenizer, settings, chunks, missing, world, captions)
    dist.barrier()
    images = sum(job.size(number) for number in numbers)
    kept = sum(job.size(number) for number in reused)
    seconds = time.perf_counter() - begin
    report = SampleReport(
        folder=str(to),
        complete=True,
        images=images,
        reused_images=kept,
        classes=list(classes),
        per_class=per_class,
        batch=job.batch,
        precision=precision,
        settings=settings,
        model=ar.path,
        tokenizer=tokenizer.hash,
        job=job.hash,
        seconds=seconds,
        images_per_s=(images - kept) / seconds,
        tokens_per_s=(images - kept) * ar.config.tokens / seconds,
    )
    text = json.dumps(asdict(replace(report, images=len(job.labels))), indent=1) + "\n"
    return replace(report, complete=by_rank_0(world, lambda: finished or chunks.assemble(text, part[0])))


def _check_asked(ar: ARModel, classes: Sequence[int], captions: Sequence[str]) -> None:
    """UserError for classes or captions that the model does not know."""
    if (ar.config.conditioning == "embedding") != bool(captions):
        needs = "captions (--captions or --prompt)" if not captions else "classes"
        raise UserError(f"the model's conditioning is {ar.config.conditioning}: give {needs}")
    number = len(captions) or ar.config.classes
    wrong = [c for c in classes if not 0 <= c < number]
    if wrong or not classes:
        raise UserError(f"class {wrong[0] if wrong else '(none)'}: the model has classes 0 to {number - 1}")


def _find(chunks: Chunks, numbers: list[int], world: World) -> tuple[list[int], list[int]]:
    """The whole chunks on disk, and the missing ones. Each rank reads its share. Collective."""
    mine = [number for number in numbers[world.rank :: world.size] if chunks.read(number) is not None]
    there = {number for found in of_all_ranks(world, mine) for number in found}
    return sorted(there), [number for number in numbers if number not in there]


@torch.inference_mode()
def _make(
    ar: ARModel,
    tokenizer: Tokenizer,
    settings: SamplingSettings,
    chunks: Chunks,
    missing: list[int],
    world: World,
    captions: Sequence[str],
) -> None:
    """Rank r makes every W-th missing chunk and writes it to disk at once, so 50,000 images need little memory."""
    job, mine = chunks.job, missing[world.rank :: world.size]
    sampler = Sampler(ar.transformer, settings, job.batch) if mine else None
    condition = ar.encode(captions) if captions and mine else None
    progress = Progress("sample", job.batch * len(missing)) if world.is_main else None
    for done, number in enumerate(mine, start=1):
        assert sampler is not None
        labels_B, ids_B = job.rows(number)
        labels = torch.tensor(labels_B)
        codes_BT = sampler(labels, torch.tensor(ids_B), condition and condition.take(labels))
        images = tokenizer.decode(codes_BT.view(job.batch, ar.config.grid, ar.config.grid))
        chunks.write(number, to_uint8(images)[: job.size(number)].permute(0, 2, 3, 1).cpu().numpy())
        if progress is not None:
            # An estimate: the other ranks are as far, since all chunks have the same size.
            images_done = min(done * world.size, len(missing)) * job.batch
            progress.show(images_done, images_done, 0)
    if progress is not None:
        progress.close()
