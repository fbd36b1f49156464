"""Stage 2: the class-conditional transformer on code shards; no tokenizer is on the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from ibq_scale.checkpoint.files import StateFile, TextFile
from ibq_scale.config.deepspeed import deepspeed_config
from ibq_scale.config.run import ARRun
from ibq_scale.data.manifest import CodesInfo, Manifest
from ibq_scale.data.sets import DataSets
from ibq_scale.data.stream import CodeBatch, code_stream
from ibq_scale.distributed.environment import World
from ibq_scale.errors import UserError
from ibq_scale.models.transformer import Transformer
from ibq_scale.pretrained.loading import CONFIG, config_text, load_tokenizer, start_from
from ibq_scale.train.alarms import Rule, Spike
from ibq_scale.train.ema import ShardedEMA
from ibq_scale.train.engine import adamw, gradient_norm, make_engine, set_rates, step
from ibq_scale.train.engine_state import engine_file, load_engine
from ibq_scale.train.randomness import seed_by_position
from ibq_scale.train.schedule import lr_factor, weight_decay
from ibq_scale.train.task import Step


class ARTask:
    """A `Task`: see there for the methods' contract."""

    shown: tuple[str, ...] = ("loss", "grad_norm")
    alarms: tuple[Rule, ...] = (Spike("loss"), Spike("grad_norm"))

    def __init__(self, run: ARRun, world: World, sets: DataSets) -> None:
        self.run = run
        self.world = world
        self.sets = sets
        self.codes = check_codes(run, sets)
        config = deepspeed_config(run, world.size)
        self.accumulation = int(config["gradient_accumulation_steps"])
        torch.manual_seed(run.train.seed)
        model = Transformer(run.model)
        if run.init is not None:
            start_from(run.init, model)
        self.engine = make_engine(model, adamw(model, run.optimizer), config, world.device)
        self.ema = ShardedEMA(self.engine, run.ema_decay, world)

    def batches(self, start: int) -> Iterator[CodeBatch]:
        return code_stream(
            self.sets,
            seed=self.run.train.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            micro_batch=self.run.train.micro_batch,
            start=start,
        )

    def set_rates(self, samples: int) -> dict[str, float]:
        total = self.run.train.total_samples
        lr = self.run.optimizer.lr * lr_factor(self.run.schedule, samples, total)
        decay = weight_decay(self.run.optimizer, samples, total)
        set_rates(self.engine, lr, decay)
        return {"lr": lr, "weight_decay": decay}

    def train_step(self, batches: Iterator[CodeBatch]) -> Step:
        total = torch.zeros((), device=self.world.device)
        for _ in range(self.accumulation):
            batch = next(batches)
            seed_by_position(self.run.train.seed, batch.requests)
            codes_BT = batch.codes.to(self.world.device, non_blocking=True)
            logits_BTV = self.engine(codes_BT, batch.labels.to(self.world.device, non_blocking=True))
            loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), codes_BT.flatten())
            self.engine.backward(loss)
            applied = step(self.engine)
            total += loss.detach() / self.accumulation
        if applied:
            self.ema.update()
        norm = gradient_norm(self.engine, self.world.device)
        return Step({"loss": total, "grad_norm": norm}, applied, total.isfinite())

    def log_metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> list[StateFile]:
        files: list[StateFile] = [engine_file(self.engine, "transformer", self.world), *self.ema.state("ema")]
        if self.world.is_main:
            weights = self.ema.place("ema", "transformer")
            config = config_text("ar", self.run.model, None, {"run": self.run.name}, self.codes.tokenizer, weights)
            files.append(TextFile(f"model/{CONFIG}", config))
        return files

    def load(self, directory: Path) -> None:
        load_engine(self.engine, directory / "transformer", self.world)
        self.ema.load(directory / "ema")

    def draw(self, directory: Path, step: int) -> None:
        """Nothing to draw: pictures need the tokenizer, which `sample` brings."""


def check_codes(run: ARRun, sets: DataSets) -> CodesInfo:
    """Reads what the code shards say of themselves. UserError where they do not fit the model or the tokenizer."""
    parts = sets.parts
    for url, part in zip(run.data.sources, parts, strict=True):
        _check_part(run, url, part.manifest)
        if (part.manifest.classes, _codes(part.manifest).tokenizer) != (
            parts[0].manifest.classes,
            _codes(parts[0].manifest).tokenizer,
        ):
            raise UserError(
                f"{url} has other classes or another tokenizer than {run.data.sources[0]}: labels and codes of several "
                f"sources must mean the same"
            )
    info = _codes(parts[0].manifest)
    if run.tokenizer is not None and load_tokenizer(run.tokenizer).hash != info.tokenizer:
        raise UserError(
            f"{run.data.sources[0]} was written by another tokenizer than {run.tokenizer}: "
            f"run ibq-scale tokenize with this one, or set tokenizer=null"
        )
    return info


def _check_part(run: ARRun, url: str, manifest: Manifest) -> None:
    info = _codes(manifest)
    if info.codebook_size != run.model.codebook_size:
        raise UserError(
            f"{url} holds codes of a codebook of {info.codebook_size}, the model expects "
            f"{run.model.codebook_size}: set model.codebook_size={info.codebook_size}"
        )
    tokens = info.grid[0] * info.grid[1]
    if tokens != run.model.tokens:
        raise UserError(
            f"{url} has {tokens} codes an image, the model expects {run.model.tokens}: set model.tokens={tokens}"
        )
    if len(manifest.classes) > run.model.classes:
        raise UserError(
            f"{url} has {len(manifest.classes)} classes, the model {run.model.classes}: "
            f"set model.classes={len(manifest.classes)}"
        )


def _codes(manifest: Manifest) -> CodesInfo:
    assert manifest.codes is not None
    return manifest.codes
