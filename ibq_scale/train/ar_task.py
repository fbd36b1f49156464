"""Stage 2: the class-conditional transformer on code shards. No tokenizer is on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ibq_scale.checkpoint.files import StateFile, TextFile
from ibq_scale.config.deepspeed import deepspeed_config
from ibq_scale.config.run import ARRun
from ibq_scale.data.sets import DataSets
from ibq_scale.data.stream import CodeBatch, code_stream
from ibq_scale.distributed.world import World
from ibq_scale.models.optimizers import adamw
from ibq_scale.models.order import Orders, draw_orders
from ibq_scale.pretrained.loading import CONFIG, config_text
from ibq_scale.profiling import part
from ibq_scale.supervise.alarms import Rule, Spike
from ibq_scale.supervise.compatible import check_codes
from ibq_scale.supervise.dashboards import Histogram
from ibq_scale.supervise.spikes import Spikes
from ibq_scale.train.determinism import seed_by_position
from ibq_scale.train.ema_model import ema_transformer
from ibq_scale.train.sample_grid import SampleGrid
from ibq_scale.train.schedule import lr_factor, random_order_share, weight_decay
from ibq_scale.train.task import Step, Validation
from ibq_scale.train.validation import HeldOutCodes
from ibq_scale.zero.engine import gradient_norm, make_engine, set_rates, step
from ibq_scale.zero.engine_state import engine_file, load_engine
from ibq_scale.zero.meta_init import build_transformer
from ibq_scale.zero.sharded_ema import ShardedEMA


class ARTask:
    """A `Task`: its methods have the contract of `Task`."""

    shown: tuple[str, ...] = ("loss", "grad_norm")
    alarms: tuple[Rule, ...] = (Spike("loss"), Spike("grad_norm"))

    def __init__(self, run: ARRun, world: World, sets: DataSets) -> None:
        self.run = run
        self.world = world
        self.sets = sets
        self.codes = check_codes(run, sets)
        self.held_out = None if run.validation.data is None else HeldOutCodes(run, world, sets)
        self.grid = SampleGrid(run, world, sets) if run.tokenizer is not None and run.validation.images else None
        self.order_share = random_order_share(run, 0)
        """Probability of a random order after the last step."""
        config = deepspeed_config(run, world.size)
        self.accumulation = int(config["gradient_accumulation_steps"])
        model = build_transformer(run, config, world)
        self.engine = make_engine(model, adamw(model, run.optimizer), config, world.device)
        self.ema = ShardedEMA(self.engine, run.ema_decay, world)
        self.spikes = Spikes(run.train.skip_spikes or 0.0, world)

    def batches(self, start: int) -> Iterator[CodeBatch]:
        return code_stream(
            self.sets,
            seed=self.run.train.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            micro_batch=self.run.train.micro_batch,
            start=start,
            conditions=self.run.model.conditioning == "embedding",
        )

    def set_rates(self, samples: int) -> dict[str, float]:
        total = self.run.train.total_samples
        lr = self.run.optimizer.lr * lr_factor(self.run.schedule, samples, total)
        decay = weight_decay(self.run.optimizer, samples, total)
        set_rates(self.engine, lr, decay)
        share = random_order_share(self.run, samples)
        order = {} if self.run.model.order == "raster" else {"random_order": share}
        self.order_share = random_order_share(self.run, samples + self.run.train.global_batch)
        return {"lr": lr, "weight_decay": decay} | order

    def train_step(self, batches: Iterator[CodeBatch]) -> Step:
        total = torch.zeros((), device=self.world.device)
        refuses = partial(self.spikes.refuses, total) if self.run.train.skip_spikes else None
        for _ in range(self.accumulation):
            batch = next(batches)
            seed_by_position(self.run.train.seed, batch.requests)
            inputs = (batch.codes, batch.labels, *self._orders(batch), batch.vectors, batch.lengths)
            with part("transformer"):
                placed = (t if t is None else t.to(self.world.device, non_blocking=True) for t in inputs)
                loss = self.engine(*placed).mean()
            with part("transformer's backward"):
                self.engine.backward(loss)
            total += loss.detach() / self.accumulation
            applied = step(self.engine, refuses)
        if applied:
            self.ema.update()
        norm = gradient_norm(self.engine, self.world.device)
        spike = None if applied else self.spikes.found()
        return Step({"loss": total, "grad_norm": norm}, applied, total.isfinite(), spike)

    def _orders(self, batch: CodeBatch) -> Orders | tuple[None, None]:
        """The order of each sample, a function of its position. None for a model in raster order."""
        if self.run.model.order == "raster":
            return None, None
        positions = batch.requests[:, 0].tolist()
        shares = [random_order_share(self.run, position) for position in positions]
        return draw_orders(self.run.train.seed, positions, shares, self.run.model.tokens)

    def histograms(self) -> dict[str, Histogram]:
        return {}

    def log_metrics(self) -> dict[str, float]:
        return {}

    def validate(self, step: int, progress: Callable[[], None]) -> Validation:
        due = step % self.run.validation.every == 0 or step == self.run.train.total_steps
        if not due or (self.held_out is None and self.grid is None):
            return Validation()
        transformer = ema_transformer(self.run, self.ema, self.world, self.order_share)
        values = {} if self.held_out is None else {"validation_loss": self.held_out.loss(transformer, progress)}
        pictures = {} if self.grid is None else {"samples": self.grid.draw(transformer, progress)}
        return Validation(values, pictures)

    def state(self) -> list[StateFile]:
        files: list[StateFile] = [engine_file(self.engine, "transformer", self.world), *self.ema.state("ema")]
        files += self.spikes.state()
        if self.world.is_main:
            model, weights = self.run.model.with_order(self.order_share), self.ema.place("ema", "transformer")
            encoder = self.codes.condition if model.conditioning == "embedding" else None
            source, tokenizer = {"run": self.run.name}, self.codes.tokenizer
            config = config_text("ar", model, None, source, tokenizer, weights, encoder, self.order_share)
            files.append(TextFile(f"model/{CONFIG}", config))
        return files

    def load(self, directory: Path) -> None:
        load_engine(self.engine, directory / "transformer", self.world)
        self.ema.load(directory / "ema")
        self.spikes.load(directory)

    def draw(self) -> dict[str, Tensor]:
        """Nothing. A validation draws samples, if the run has a tokenizer."""
        return {}
