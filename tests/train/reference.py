"""Both stages in plain torch on one process, as ZeRO must equal them, and small runs of the tasks to compare."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ibq_scale.checkpoint.files import write_all
from ibq_scale.checkpoint.pieces import Piece
from ibq_scale.config.layers import resolve
from ibq_scale.config.run import ARRun, TokenizerRun
from ibq_scale.data.sets import DataSets, open_sets
from ibq_scale.data.stream import ImageBatch, code_stream
from ibq_scale.distributed.world import World
from ibq_scale.losses.adversarial import LeCAM, discriminator_hinge, generator_non_saturating
from ibq_scale.models.autoencoder import TokenizerModel
from ibq_scale.models.discriminator import PatchDiscriminator
from ibq_scale.models.transformer import Transformer
from ibq_scale.quantize.quantizer import initial_codebook
from ibq_scale.quantize.region import initial_ages
from ibq_scale.zero.master_weights import pieces, shapes
from tests.samples import SMALL_AR

# Adam's moments and the averages show in a few.
STEPS, MICRO = 6, 2

# Two runs that differ in the last bit part visibly where a value lies between them and a kink. The discriminator's are
# smoothed in both; of L1's, images are drawn until the plain run stays this far from every one.
KINK_MARGIN = 5e-6

NO_DROPOUT = [f"model.{name}=0" for name in ("token_dropout", "residual_dropout", "ffn_dropout", "label_dropout")]


def smooth_leaky_relu(self: torch.nn.LeakyReLU, x: Tensor) -> Tensor:
    """A LeakyReLU without its kink, for `forward`: two runs that differ in the last bit part visibly at a kink."""
    return self.negative_slope * x + (1.0 - self.negative_slope) * F.softplus(4.0 * x) / 4.0


def gather(share: Iterable[Piece], whole: dict[str, torch.Size], world: World) -> dict[str, Tensor] | None:
    """The parameters that the ranks' shares make, fp32 on rank 0's CPU; None elsewhere. Collective."""
    mine = {piece.name: piece for piece in share}
    weights = {}
    for name, shape in whole.items():
        flat = torch.zeros(shape.numel(), device=world.device)
        if name in mine:
            _, start, values = mine[name]
            flat[start : start + len(values)] = values
        dist.reduce(flat, dst=0)
        if world.is_main:
            weights[name] = flat.view(shape).cpu()
    return weights if world.is_main else None


class PlainTokenizerTraining:
    """One process. Micro-batches decide BatchNorm's statistics; calls, the images of one adaptive weight."""

    def __init__(self, run: TokenizerRun) -> None:
        self.run = run
        torch.manual_seed(run.train.seed)
        self.model = TokenizerModel(run.model, run.quantizer)
        self.discriminator = PatchDiscriminator(run.discriminator)
        codes = initial_codebook(run.quantizer, run.train.seed, 0, run.quantizer.codebook_size)
        self.codebook_KD = torch.nn.Parameter(codes)
        self.age_K = initial_ages(run.quantizer, len(codes))
        o = run.optimizer
        codebook = {"params": [self.codebook_KD], "lr": o.codebook_lr or o.lr}
        groups = [{"params": [*self.model.parameters()]}, codebook]
        self.g_optimizer = torch.optim.Adam(groups, o.lr, o.betas, o.eps)
        self.d_optimizer = torch.optim.Adam(self.discriminator.parameters(), o.lr, o.betas, o.eps)
        self.lecam = LeCAM(run.loss.lecam_decay)
        self.averages = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.kink_distance = float("inf")
        """How near the run has come to a point where a gradient jumps: |fake − image| in L1."""

    def _note_kink(self, x: Tensor) -> None:
        self.kink_distance = min(self.kink_distance, float(x.detach().abs().min()))

    def _adversarial_weight(self, pixels: Tensor, gan: Tensor) -> Tensor | float:
        """VQGAN's formula as its authors wrote it."""
        loss = self.run.loss
        if loss.adversarial == "constant":
            return loss.adversarial_weight
        last = self.model.autoencoder.decoder.conv_out.weight
        norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (pixels, gan)]
        return loss.adversarial_weight * (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()

    def step(self, images_BCHW: Tensor, micro_batches: int, calls: int) -> None:
        """Trains on a global batch: `calls` rounds of all ranks, or of each rank alone where it has its own entropy."""
        loss = self.run.loss
        generator = torch.zeros(())
        pairs = []
        rounds = 1 if self.run.quantizer.entropy_scope == "global" else calls
        for images in images_BCHW.chunk(rounds):
            reconstruction, quantized = self.model(images, self.codebook_KD, age_K=self.age_K)
            terms = (
                loss.quantization_weight * quantized.quantization_loss + loss.entropy_weight * quantized.entropy_loss
            )
            generator = generator + terms / rounds
            parts = micro_batches // rounds
            pairs += list(zip(images.chunk(parts), reconstruction.chunk(parts), strict=True))
        for first in range(0, micro_batches, micro_batches // calls):
            here = pairs[first : first + micro_batches // calls]
            for image, fake in here:
                self._note_kink(fake - image)
            pixels = loss.l1_weight * torch.stack([(fake - image).abs().mean() for image, fake in here]).mean()
            pixels = (
                pixels + loss.l2_weight * torch.stack([(fake - image).square().mean() for image, fake in here]).mean()
            )
            gan = torch.stack([generator_non_saturating(self.discriminator(fake)) for _, fake in here]).mean()
            generator = generator + (pixels + self._adversarial_weight(pixels, gan) * gan) / calls
        self.g_optimizer.zero_grad()
        generator.backward()
        self.d_optimizer.zero_grad()
        logits = [(self.discriminator(image), self.discriminator(fake.detach())) for image, fake in pairs]
        total = torch.stack(
            [discriminator_hinge(r, f) + loss.lecam_weight * self.lecam.penalty(r, f) for r, f in logits]
        ).mean()
        total.backward()
        self.g_optimizer.step()
        self.d_optimizer.step()
        for name, parameter in self.model.named_parameters():
            self.averages[name].lerp_(parameter.detach(), 1.0 - self.run.ema_decay)
        means = [torch.stack([pair[i].detach().mean() for pair in logits]).mean() for i in (0, 1)]
        self.lecam.update(means[0], means[1])


def tokenizer_run(deepspeed: str, *overrides: str) -> TokenizerRun:
    """Adam's eps is large: its step is then smooth in the gradient, and a wrong gradient's size shows."""
    run = resolve(
        "tokenizer/tiny",
        [
            "data.train=none",
            "model.channel_multipliers=[1,1]",
            "model.resolution=16",
            "model.attention_resolutions=[8]",
            "model.z_channels=8",
            "quantizer.dim=8",
            "quantizer.codebook_size=32",
            "quantizer.entropy_temperature=1.0",
            f"train.micro_batch={MICRO}",
            "optimizer.lr=0.01",
            "optimizer.eps=0.01",
            f"deepspeed.config={deepspeed}",
            *overrides,
        ],
    ).config
    assert isinstance(run, TokenizerRun)
    return run


def draw_images(draw: int, step: int, count: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1000 * draw + step)
    return torch.randint(256, (count, 3, 16, 16), generator=g, dtype=torch.uint8)


def image_batches(images: torch.Tensor, rank: int, world_size: int) -> list[ImageBatch]:
    none = torch.zeros(MICRO, dtype=torch.int64)
    requests = torch.arange(len(images))[:, None].expand(-1, 5)
    return [
        ImageBatch(part, none, places)
        for part, places in list(zip(images.split(MICRO), requests.split(MICRO), strict=True))[rank::world_size]
    ]


def train_tokenizers(
    rank: int, world_size: int, runs: dict[str, TokenizerRun], draws: dict[str, int]
) -> dict[str, dict[str, torch.Tensor]]:
    """Trains each run on its draw of images; returns rank 0's weights by name, the codebook put together."""
    from ibq_scale.train.tokenizer_task import TokenizerTask

    world = World(rank, world_size, rank, torch.device("cpu"))
    torch.nn.LeakyReLU.forward = smooth_leaky_relu
    results = {}
    for name, run in runs.items():
        task = TokenizerTask(run, world, DataSets((), run.data))
        for step in range(STEPS):
            task.set_rates(step * run.train.global_batch)
            images = draw_images(draws[name], step, run.train.global_batch)
            task.train_step(iter(image_batches(images, rank, world_size)))
        rows = [torch.empty_like(task.codebook.rows.detach()) for _ in range(world_size)]
        dist.all_gather(rows, task.codebook.rows.detach())
        results[name] = (
            whole_weights(task.generator, world)
            | whole_weights(task.discriminator, world)
            | {f"ema.{k}": v for k, v in (gather(task.ema.pieces(), shapes(task.generator), world) or {}).items()}
            | {"codebook": torch.cat(rows[: task.codebook.group_size]), "ema_fake": task.lecam.fake.clone()}
        )
    return {name: {k: v.numpy() for k, v in tensors.items()} for name, tensors in results.items()}


def whole_weights(engine: Any, world: World) -> dict[str, torch.Tensor]:
    """The fp32 weights of all ranks on rank 0; where parameters are whole on each rank, they have to be the same."""
    whole = gather(pieces(engine, world), shapes(engine), world) or {}
    if engine.zero_optimization_stage() < 3:
        for name, value in whole.items():
            live = engine.module.get_parameter(name).detach()
            assert torch.equal(live, value.to(live.dtype)), name
    return whole


def tokenizer_state(task: Any, world: World) -> dict[str, torch.Tensor]:
    """All that a step changes, this rank's part."""
    tensors = {f"g.{f.name}": f.values for f in pieces(task.generator, world)}
    tensors |= {f"d.{f.name}": f.values for f in pieces(task.discriminator, world)}
    tensors |= {f"ema.{k}": v for k, v in task.ema.shadow.state_dict().items()}
    tensors |= {f"buffer.{k}": v for k, v in task.discriminator.module.named_buffers()}
    tensors |= {"codebook": task.codebook.rows, "ema_rows": task.codebook.ema_rows, "lecam": task.lecam.fake}
    tensors |= {} if task.codebook.age_K is None else {"age": task.codebook.age_K}
    moments = task.codebook.optimizer.state.get(task.codebook.rows, {})
    return {k: v.detach().clone() for k, v in (tensors | moments).items()}


def plain_tokenizer(run: TokenizerRun, calls: int = 1, steps: int = STEPS) -> tuple[int, dict[str, torch.Tensor]]:
    """The first draw of images that keeps away from kinks, and the weights after training on it."""
    forward = torch.nn.LeakyReLU.forward
    torch.nn.LeakyReLU.forward = smooth_leaky_relu
    try:
        return _plain_smooth(run, calls, steps)
    finally:
        torch.nn.LeakyReLU.forward = forward


def _plain_smooth(run: TokenizerRun, calls: int, steps: int) -> tuple[int, dict[str, torch.Tensor]]:
    for draw in range(100):
        reference = PlainTokenizerTraining(run)
        for step in range(steps):
            images = draw_images(draw, step, run.train.global_batch).float().div(127.5).sub(1.0)
            reference.step(images, run.train.global_batch // MICRO, calls)
        if reference.kink_distance > KINK_MARGIN:
            return draw, (
                dict(reference.model.named_parameters())
                | {f"discriminator.{k}": v for k, v in reference.discriminator.named_parameters()}
                | {f"ema.{k}": v for k, v in reference.averages.items()}
                | {"codebook": reference.codebook_KD, "ema_fake": reference.lecam.fake}
            )
    raise AssertionError("no draw of images keeps away from kinks")


def assert_same(found: dict[str, Any], expected: dict[str, torch.Tensor], run: str) -> None:
    assert found.keys() == expected.keys(), run
    for name, value in expected.items():
        value = value.detach()
        got = torch.from_numpy(found[name]).view_as(value)
        torch.testing.assert_close(got, value, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{run}: {n}: {m}")


def ar_run(codes: str, *overrides: str) -> ARRun:
    """Adam's eps is large, so that its step is smooth in the gradient."""
    words = [f"data.train={codes}", "train.global_batch=8", "train.micro_batch=2", "optimizer.eps=0.01"]
    run = resolve("ar/tiny", [*words, *SMALL_AR, *NO_DROPOUT, "schedule.warmup_samples=0", *overrides]).config
    assert isinstance(run, ARRun)
    return run


def train_transformers(
    rank: int, world_size: int, runs: dict[str, ARRun]
) -> dict[str, tuple[dict[str, Any], list[float]]]:
    """Rank 0's fp32 weights, put together, and this rank's losses, by run."""
    from ibq_scale.train.ar_task import ARTask

    world = World(rank, world_size, rank, torch.device("cpu"))
    results = {}
    for name, run in runs.items():
        task = ARTask(run, world, open_sets(run.data, "codes"))
        batches = task.batches(0)
        losses = []
        for step in range(STEPS):
            task.set_rates(step * 8)
            losses.append(float(task.train_step(batches).metrics["loss"]))
        weights = gather(pieces(task.engine, world), shapes(task.engine), world) or {}
        results[name] = ({k: v.numpy() for k, v in weights.items()}, losses)
    return results


def plain_transformer(run: ARRun, steps: int) -> tuple[Transformer, list[float]]:
    """The model and its losses after some steps in plain torch on one process."""
    model = Transformer(run.model, run.train.seed)
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "emb" not in n]
    free = [p for n, p in model.named_parameters() if p.ndim <= 1 or "emb" in n]
    o = run.optimizer
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, o.lr, o.betas, o.eps)
    size = run.train.global_batch
    stream = code_stream(open_sets(run.data, "codes"), seed=0, rank=0, world_size=1, micro_batch=size, start=0)
    losses = []
    for _ in range(steps):
        batch = next(stream)
        loss = F.cross_entropy(model(batch.codes, batch.labels).flatten(0, 1), batch.codes.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses


def ar_losses(
    rank: int, size: int, runs: dict[str, ARRun], folder: Path, first: int, last: int
) -> dict[str, list[float]]:
    """Mean losses of the steps first … last of each run with 8 samples a step, and its validation if it has one.

    A run starts from the checkpoint of step `first` if that is not 0, and leaves one of step `last`.
    """
    from ibq_scale.train.ar_task import ARTask

    world, losses = World(rank, size, rank, torch.device("cpu")), {}
    for name, run in runs.items():
        task = ARTask(run, world, open_sets(run.data, "codes"))
        if first:
            task.load(folder / f"{name}-{first}")
        batches = task.batches(8 * first)
        found = []
        for step in range(first, last):
            rates = task.set_rates(8 * step)
            assert ("random_order" in rates) == (run.model.order != "raster")
            loss = task.train_step(batches).metrics["loss"]
            torch.distributed.all_reduce(loss)
            found.append(float(loss) / size)
        write_all(task.state(), folder / f"{name}-{last}")
        losses[name] = [*found, *task.validate(last, lambda: None).values.values()]
    return losses
