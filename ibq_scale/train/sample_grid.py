"""Samples of a transformer in training, with the same classes and random numbers each time, to compare steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from ibq_scale.config.run import ARRun
from ibq_scale.data.sets import DataSets
from ibq_scale.data.stream import evaluation_codes, shares
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.evaluate.scores import gather_rows
from ibq_scale.generate.published import published_sampling
from ibq_scale.models.condition import Condition
from ibq_scale.models.sampling import Sampler, SamplingSettings
from ibq_scale.models.transformer import Transformer
from ibq_scale.pictures import image_grid, to_uint8
from ibq_scale.pretrained.loading import load_tokenizer

# Images per batch. Fixed, since the last bits of a product depend on it.
CHUNK = 4


class SampleGrid:
    """`validation.images` pictures of evenly spaced classes, decoded by the run's tokenizer. A model that reads
    conditions takes those of the first samples in the order of an evaluation.

    The tokenizer is in host memory between calls. UserError if it cannot be loaded.
    """

    def __init__(self, run: ARRun, world: World, sets: DataSets) -> None:
        assert run.tokenizer is not None
        self.run = run
        self.world = world
        self.tokenizer = load_tokenizer(run.tokenizer)
        count, classes = run.validation.images, run.model.classes
        self.labels = [place * classes // count for place in range(count)]
        self.condition: Condition | None = None
        if run.model.conditioning == "embedding":
            batches = evaluation_codes(sets, rank=0, world_size=1, batch=count, limit=count, conditions=True)
            first, _ = next(batches)
            self.condition = Condition.of(first.vectors, first.lengths)
            self.labels = list(range(count))
        # The images of a class have different numbers.
        self.ids = [place - self.labels.index(label) for place, label in enumerate(self.labels)]
        guidance = temperature = 1.0
        with suppress(UserError):
            guidance, temperature = published_sampling(run.model)
        validation = run.validation
        self.settings = SamplingSettings(validation.guidance or guidance, validation.temperature or temperature)

    @torch.inference_mode()
    def draw(self, transformer: Transformer, progress: Callable[[], None]) -> Tensor:
        """The grid, uint8 (3, H, W) on the CPU, on every rank. Collective, with equal pixels for any number of ranks.

        All ranks make equally many images, so some images are made twice.
        """
        device, side = self.world.device, self.run.model.grid
        tokenizer = self.tokenizer.to(device)
        sampler = Sampler(transformer, self.settings, CHUNK, graphs=False)
        count = len(self.labels)
        indices, rows = [], []
        for places, taken, weights_B in shares(count, self.world.rank, self.world.size, CHUNK):
            progress()
            labels_B, ids_B = (torch.tensor([of[t] for t in taken]) for of in (self.labels, self.ids))
            codes_BT = sampler(labels_B, ids_B, self.condition and self.condition.take(torch.tensor(taken)))
            images_u8 = to_uint8(tokenizer.decode(codes_BT.view(CHUNK, side, side)))
            held = weights_B > 0
            indices.append(torch.tensor(places)[held])
            rows.append(images_u8.flatten(1)[held.to(device)])
        pixels_NP = gather_rows(torch.cat(indices), torch.cat(rows))
        self.tokenizer.to("cpu")
        return image_grid(pixels_NP.view(count, *images_u8.shape[1:]), columns=math.ceil(math.sqrt(count)))
