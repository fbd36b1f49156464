"""Stage 1: encoder, sharded-codebook quantizer, decoder against a discriminator, with LPIPS and entropy.

Two DeepSpeed engines in a pattern exact on every ZeRO stage (tried on 0.19.8). The generator's loss goes through the
*frozen* discriminator module. Then one discriminator call takes (real, detached fake). Both sides see the other's
weights of the step before, so accumulation and rank count do not change the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from ibq_scale.checkpoint.files import StateFile, TensorFile, TextFile
from ibq_scale.config.deepspeed import deepspeed_config
from ibq_scale.config.run import TokenizerRun
from ibq_scale.data.sets import DataSets
from ibq_scale.data.stream import ImageBatch, image_stream, to_float
from ibq_scale.distributed.world import World
from ibq_scale.losses.adversarial import LastLayer, LeCAM, adaptive_weight, discriminator_hinge
from ibq_scale.losses.frozen_vit import FrozenFeatures, backbone_of
from ibq_scale.losses.image import ImageLoss
from ibq_scale.losses.perceptual import Perceptual
from ibq_scale.models.aligned import AlignedTokenizer
from ibq_scale.models.autoencoder import TokenizerModel, frozen_parameters, tokens_of
from ibq_scale.models.discriminator import iterate_spectral_norms, make_discriminator
from ibq_scale.models.layout import compute_dtype
from ibq_scale.models.optimizers import adam
from ibq_scale.pictures import reconstruction_grid
from ibq_scale.pretrained.loading import CONFIG, config_text, load_tokenizer, start_from
from ibq_scale.profiling import part
from ibq_scale.quantize.kinds import KINDS
from ibq_scale.supervise.alarms import Above, Drop, Rule, Spike
from ibq_scale.supervise.budgets import BadSamples
from ibq_scale.supervise.dashboards import Histogram
from ibq_scale.supervise.spikes import Spikes
from ibq_scale.train.codebook import ShardedCodebook
from ibq_scale.train.determinism import seed_by_position
from ibq_scale.train.ema_model import ema_tokenizer
from ibq_scale.train.schedule import codebook_lr, lr_factor
from ibq_scale.train.task import Step, StepMetrics, Validation
from ibq_scale.train.usage import UsageTracker
from ibq_scale.train.validation import HeldOutImages
from ibq_scale.zero.engine import always, discriminator_config, gradient_norm, make_engine, set_rates, step
from ibq_scale.zero.engine_state import engine_file, load_engine, restore_weights
from ibq_scale.zero.sharded_ema import ShardedEMA

LECAM = "lecam.safetensors"


class DiscriminatorPair(nn.Module):
    """Real and fake in one engine call, but as two batches: BatchNorm must not mix their statistics."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.discriminator(real), self.discriminator(fake)


class TokenizerTask:
    """A `Task`: its methods have the contract of `Task`."""

    shown: tuple[str, ...] = ("loss", "l1", "usage", "perplexity")
    alarms: tuple[Rule, ...] = (
        Spike("loss"),
        Spike("l1"),
        Spike("grad_norm"),
        Drop("usage"),
        # Beyond ±1 on both sides the hinge has no gradient, and the generator gets no useful one either.
        Above("logit_gap", 4.0, "the discriminator has won: lower loss.adversarial_weight or its rate"),
        Above("discriminator_accuracy", 0.98, "the discriminator has won: lower loss.adversarial_weight or its rate"),
    )

    def __init__(self, run: TokenizerRun, world: World, sets: DataSets) -> None:
        self.run = run
        self.world = world
        self.sets = sets
        config = deepspeed_config(run, world.size)
        # First, since their files may be absent, and engines are slow to build.
        net = run.loss.perceptual
        dtype = compute_dtype(run)
        self.image_loss = ImageLoss(run.loss, None if net == "none" else Perceptual(net, world.device, dtype))
        backbone = backbone_of(run.discriminator, world.device, dtype)
        self.features = FrozenFeatures.of(run.loss, run.model, world.device, dtype)
        self.held_out = None if run.validation.data is None else HeldOutImages(run, world, sets)
        self.accumulation = int(config["gradient_accumulation_steps"])
        # Every rank starts from the same weights.
        torch.manual_seed(run.train.seed)
        made = (run.model, run.quantizer)
        model = TokenizerModel(*made) if self.features is None else AlignedTokenizer(*made, self.features.width)
        if run.init is not None:
            start_from(run.init, model.autoencoder)
        if run.model.compile:
            model.autoencoder.compile_regions(sizes=len(run.data.aspects) or 1)
        pair = DiscriminatorPair(make_discriminator(run.discriminator, backbone))
        exact = {name: p.detach().clone() for name, p in model.named_parameters()} if run.train.freeze else {}
        frozen = frozen_parameters(model.autoencoder, run.train.freeze)
        self.generator = make_engine(model, adam(model.parameters(), run.optimizer, frozen), config, world.device)
        if exact:
            restore_weights(self.generator, exact, world)
        self.discriminator = make_engine(
            pair, adam(pair.parameters(), run.optimizer), discriminator_config(config), world.device
        )
        self.codebook = ShardedCodebook(run, world)
        self.codes_of = _codes_of(run) if world.is_main else []
        self.ema = ShardedEMA(self.generator, run.ema_decay, world)
        adaptive = run.loss.adversarial == "adaptive"
        self.last_layer = LastLayer(model.autoencoder.decoder.conv_out) if adaptive else None
        self.spikes = Spikes(run.train.skip_spikes or 0.0, world)
        self.lecam = LeCAM(run.loss.lecam_decay, world.device)
        self.usage = UsageTracker(run.quantizer.codebook_size, run.quantizer.revive_after, world)
        self.bad_samples = BadSamples(run.data.bad_samples, world)
        self.codebook_lr = 0.0
        self.number = 0
        self.adversarial = False
        self._last: tuple[Tensor, Tensor] | None = None

    def batches(self, start: int) -> Iterator[ImageBatch]:
        return image_stream(
            self.sets,
            resolution=self.run.model.resolution,
            seed=self.run.train.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            micro_batch=self.run.train.micro_batch,
            start=start,
            crops=self.run.crop_sizes,
        )

    def set_rates(self, samples: int) -> dict[str, float]:
        self.number = samples // self.run.train.global_batch + 1
        optimizer, schedule, total = self.run.optimizer, self.run.schedule, self.run.train.total_samples
        lr = optimizer.lr * lr_factor(schedule, samples, total)
        self.codebook_lr = codebook_lr(optimizer, schedule, samples, total)
        self.adversarial = samples >= self.run.loss.adversarial_start and self.run.loss.adversarial_weight > 0
        if 0 <= samples - self.run.loss.adversarial_start < self.run.train.global_batch:
            self.spikes.forget()
        set_rates(self.generator, lr)
        set_rates(self.discriminator, lr)
        return {"lr": lr, "codebook_lr": self.codebook_lr}

    def train_step(self, batches: Iterator[ImageBatch]) -> Step:
        sums: StepMetrics = {}
        total = torch.zeros((), device=self.world.device)
        refuses = partial(self.spikes.refuses, total) if self.run.train.skip_spikes else None
        finite = torch.ones((), dtype=torch.bool, device=self.world.device)
        statistics = [buffer.clone() for buffer in self.discriminator.module.buffers()]
        discriminator_stepped = True
        micro_batches = [self._to_device(next(batches)) for _ in range(self.accumulation)]
        with part("mean of q over the step"):
            mean_K = self._step_mean(micro_batches)
        for batch in micro_batches:
            images = to_float(batch.images_u8)
            seed_by_position(self.run.train.seed, batch.requests)
            metrics, reconstruction = self._generator_backward(images, mean_K)
            total += metrics["loss"] / self.accumulation
            applied = step(self.generator, refuses)
            if self.adversarial:
                metrics |= self._discriminator_backward(images, reconstruction)
                # Both networks take the step, or none. Within an accumulation no step is asked for.
                discriminator_stepped = step(self.discriminator, None if applied else always)
            for name, value in metrics.items():
                finite &= value.isfinite()
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / self.accumulation
        if applied:
            with part("codebook's optimizer"):
                applied = self.codebook.step(self.codebook_lr)
            self.ema.update()
        else:
            self.codebook.drop_gradient()
        self.usage.end_step()
        self._revive(images)
        if not discriminator_stepped:
            # Their running means include the pictures of the step that was not finite.
            for buffer, before in zip(self.discriminator.module.buffers(), statistics, strict=True):
                buffer.copy_(before)
        elif self.adversarial:
            self._update_lecam(sums)
            iterate_spectral_norms(self.discriminator.module)
        sums["grad_norm"] = gradient_norm(self.generator, self.world.device)
        spike = None if applied else self.spikes.found()
        return Step(sums, applied and discriminator_stepped, finite, spike)

    def _to_device(self, batch: ImageBatch) -> ImageBatch:
        self.bad_samples.note(batch.faults)
        return batch._replace(images_u8=batch.images_u8.to(self.world.device, non_blocking=True))

    def _step_mean(self, micro_batches: list[ImageBatch]) -> Tensor | None:
        """q̄ over the whole step, for several micro-batches and a batch entropy over all of them.

        The entropy of a mean is not the mean of entropies: without this, the objective would change with the number of
        ranks. It costs the encoder's forward pass and one of the quantizer's.
        """
        settings = self.run.quantizer
        weight = self.run.loss.entropy_weight * settings.batch_entropy_weight
        if (
            len(micro_batches) == 1
            or not weight
            or settings.entropy_scope == "local"
            or KINDS[settings.kind].batch_sums is None
        ):
            return None
        sums = count = torch.zeros((), device=self.world.device)
        for batch in micro_batches:
            seed_by_position(self.run.train.seed, batch.requests)
            with torch.no_grad():
                codes = self.codebook.codes()
            here, tokens = self.generator.module.batch_sums(to_float(batch.images_u8), codes, self.codebook.shards)
            sums, count = sums + here, count + tokens
        return sums / count

    def _generator_backward(self, images: Tensor, mean_K: Tensor | None) -> tuple[StepMetrics, Tensor]:
        weights = self.run.loss
        target = () if self.features is None else (self.features(images),)
        codebook = self.codebook
        reconstruction, quantized, *misalignment = self.generator(
            images, codebook.codes(), codebook.shards, mean_K, codebook.age_K, *target
        )
        shown = reconstruction.detach().float()
        discriminator = self.discriminator.module.discriminator if self.adversarial else None
        balance = None if self.last_layer is None else self._adaptive_weight
        with part("losses of the reconstruction"):
            metrics, loss, gradient = self.image_loss(images, shown, discriminator, balance)
        rest = (
            weights.quantization_weight * quantized.quantization_loss + weights.entropy_weight * quantized.entropy_loss
        )
        for term in misalignment:
            metrics["features"] = term.detach()
            rest = rest + weights.feature_weight * term
        # A scalar with the gradient computed above at the reconstruction.
        with part("generator's backward"):
            self.generator.backward((reconstruction * gradient).sum() + rest)
        self.usage.update(quantized.indices_N)
        self._last = (images, shown)
        metrics |= {
            "quantization": quantized.quantization_loss.detach(),
            "entropy": quantized.entropy_loss.detach(),
            "loss": loss + rest.detach(),
            "sample_entropy": quantized.sample_entropy.detach(),
            "batch_entropy": quantized.batch_entropy.detach(),
        }
        return metrics, shown

    def _adaptive_weight(self, *gradients: Tensor) -> Tensor:
        """From the gradients' means over ranks, so every rank gets the same weight."""
        assert self.last_layer is not None
        means = torch.stack([self.last_layer.weight_gradient(gradient) for gradient in gradients])
        dist.all_reduce(means)
        return adaptive_weight(*(means / self.world.size))

    def _discriminator_backward(self, images: Tensor, reconstruction: Tensor) -> StepMetrics:
        with part("discriminator"):
            real, fake = self.discriminator(images, reconstruction)
        real, fake = real.float(), fake.float()
        hinge = discriminator_hinge(real, fake)
        lecam = self.lecam.penalty(real, fake)
        with part("discriminator's backward"):
            self.discriminator.backward(hinge + self.run.loss.lecam_weight * lecam)
        return {
            "discriminator": hinge.detach(),
            "lecam": lecam.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
            "logit_gap": real.detach().mean() - fake.detach().mean(),
            "discriminator_accuracy": ((real.detach() > 0).float().mean() + (fake.detach() < 0).float().mean()) / 2,
        }

    def _update_lecam(self, sums: StepMetrics) -> None:
        """The EMA follows the means over the whole global batch, the same on every rank."""
        means = torch.stack([sums["logits_real"], sums["logits_fake"]])
        dist.all_reduce(means)
        means /= self.world.size
        self.lecam.update(means[0], means[1])

    @torch.no_grad()
    def _revive(self, images: Tensor) -> None:
        """Replaces unused codes by tokens of the newest images, if the config asks for it (VQ)."""
        dead_K = self.usage.due_for_revival(self.number)
        if dead_K is not None:
            tokens_ND = tokens_of(self.generator.module.autoencoder.encode(images))
            self.codebook.revive(dead_K, tokens_ND, self.run.train.seed + self.number)

    def histograms(self) -> dict[str, Histogram]:
        return {"code_choices": self.usage.choices}

    def log_metrics(self) -> dict[str, float]:
        return self.usage.log() | self.bad_samples.log()

    def validate(self, step: int, progress: Callable[[], None]) -> Validation:
        due = step % self.run.validation.every == 0 or step == self.run.train.total_steps
        if not due or self.held_out is None:
            return Validation()
        tokenizer = ema_tokenizer(self.run, self.ema, self.codebook, self.world)
        values = self.held_out.measure(tokenizer, progress)
        return Validation({f"validation_{name}": value for name, value in values.items()})

    def state(self) -> list[StateFile]:
        files: list[StateFile] = [
            engine_file(self.generator, "generator", self.world),
            engine_file(self.discriminator, "discriminator", self.world),
            *self.codebook.state("codebook"),
            *self.ema.state("ema"),
            *self.usage.state(),
            *self.bad_samples.state(),
            *self.spikes.state(),
            *self._export("model"),
        ]
        return [*files, TensorFile(LECAM, self.lecam.state_dict())] if self.world.is_main else files

    def _export(self, folder: str) -> list[StateFile]:
        """The files of `load_tokenizer`: the place of the averaged weights, and the codebook by this group's rows."""
        if not self.world.is_main:
            return self.codebook.export(folder)
        weights = self.ema.place("ema", "generator", "autoencoder.")
        model = self.run.model.architecture()
        source = {"run": self.run.name} | ({"codes_of": self.codes_of} if self.codes_of else {})
        config = config_text("tokenizer", model, self.run.quantizer, source, weights=weights)
        return [TextFile(f"{folder}/{CONFIG}", config), *self.codebook.export(folder)]

    def load(self, directory: Path) -> None:
        load_engine(self.generator, directory / "generator", self.world)
        load_engine(self.discriminator, directory / "discriminator", self.world)
        self.codebook.load(directory / "codebook")
        self.ema.load(directory / "ema")
        self.usage.load(directory)
        self.bad_samples.load(directory)
        self.spikes.load(directory)
        self.lecam.load_state_dict(load_file(directory / LECAM))

    def draw(self) -> dict[str, Tensor]:
        return {} if self._last is None else {"reconstructions": reconstruction_grid(*self._last)}


def _codes_of(run: TokenizerRun) -> list[str]:
    """Hashes of the tokenizers whose codes stay valid, since encoder and codebook are theirs."""
    if run.init is None or not {"encoder", "codebook"} <= set(run.train.freeze):
        return []
    first = load_tokenizer(run.init)
    return [*first.codes_of, first.hash]
