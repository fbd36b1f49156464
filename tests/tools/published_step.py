"""The tokenizer's training step against the published one: ``python -m tests.tools.published_step --published FOLDER``.

FOLDER is a checkout of the published code (github.com/TencentARC/SEED-Voken), which is no part of this project; its
modules need einops. One process and one rank hold three trainings of one model from the same weights and take steps by
turns: ours under ZeRO-2, ours as one rank resolves it, and the published modules in the published order of a step, EMA
included, in a plain loop. Both take the same noise. LPIPS is left out of all three. Compared are medians of CPU seconds
(on a busy machine wall times are noise). The exit code is 1 where the trainings' first L1 losses differ.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import statistics
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from ibq_scale.bench.tokenizer import _synthetic
from ibq_scale.config.layers import resolve
from ibq_scale.config.run import TokenizerRun
from ibq_scale.data.sets import DataSets
from ibq_scale.data.stream import ImageBatch, to_float
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.pretrained.models import Tokenizer
from ibq_scale.pretrained.published import published_tokenizer
from ibq_scale.train.tokenizer_task import TokenizerTask

SETTINGS = (
    "data.train=none",
    "model.resolution=64",
    "loss.perceptual=none",
    "train.precision=fp32",
    "train.global_batch=2",
    "train.micro_batch=2",
    "train.samples=1000000",
)
FORCED, RESOLVED, PUBLISHED = "ours, ZeRO-2", "ours, as one rank resolves it", "published"
TOLERANCE = 1e-4

Train = Callable[[], float]
"""Trains one step; gives its L1 loss."""


def published_module(folder: Path, name: str) -> Any:
    """A module of the published code. UserError where it cannot be had."""
    if not (folder / "src/IBQ").is_dir():
        raise UserError(f"{folder} has no src/IBQ: give a checkout of github.com/TencentARC/SEED-Voken")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    # LPIPS would need torchvision and fetch its weights; this comparison leaves it out.
    lpips = types.ModuleType("src.IBQ.modules.losses.lpips")
    lpips.LPIPS = nn.Identity  # type: ignore[attr-defined]
    sys.modules.setdefault(lpips.__name__, lpips)
    try:
        return importlib.import_module(f"src.IBQ.modules.{name}")
    except ImportError as e:
        raise UserError(f"the published code cannot be imported: {e}") from None


class PublishedModel(nn.Module):
    """The published modules under their names, built as `src.IBQ.models.ibqgan.IBQ` builds them."""

    def __init__(self, folder: Path, run: TokenizerRun) -> None:
        super().__init__()
        networks = published_module(folder, "diffusionmodules.model")
        model, quantizer, loss = run.model, run.quantizer, run.loss
        sizes = {
            "double_z": False,
            "z_channels": model.z_channels,
            "resolution": model.resolution,
            "in_channels": 3,
            "out_ch": 3,
            "ch": model.channels,
            "ch_mult": list(model.channel_multipliers),
            "num_res_blocks": model.res_blocks,
            "attn_resolutions": list(model.attention_resolutions),
            "dropout": model.dropout,
        }
        self.encoder = networks.Encoder(**sizes)
        self.decoder = networks.Decoder(**sizes)
        self.loss = published_module(folder, "losses.vqperceptual").VQLPIPSWithDiscriminator(
            disc_start=0,
            perceptual_weight=0.0,
            gen_loss_weight=loss.adversarial_weight,
            lecam_loss_weight=loss.lecam_weight,
            quant_loss_weight=loss.quantization_weight,
            entropy_loss_weight=loss.entropy_weight,
        )
        self.quantize = published_module(folder, "vqvae.quantize").IndexPropagationQuantize(
            quantizer.codebook_size, quantizer.dim, quantizer.beta, use_entropy_loss=True
        )
        self.quant_conv = nn.Conv2d(model.z_channels, quantizer.dim, 1)
        self.post_quant_conv = nn.Conv2d(quantizer.dim, model.z_channels, 1)

    def copy_weights(self, task: TokenizerTask) -> None:
        """Takes over every weight of `task`."""
        ours = Tokenizer(task.run.model, task.run.quantizer)
        ours.autoencoder.load_state_dict(task.generator.module.autoencoder.state_dict())
        ours.codebook_KD.data.copy_(task.codebook.rows.detach())
        here = dict(self.named_parameters())
        weights = {name: tensor for name, tensor in published_tokenizer(ours).items() if name in here}
        judge = task.discriminator.module.discriminator.state_dict()
        weights |= {f"loss.discriminator.{name}": tensor for name, tensor in judge.items()}
        assert here.keys() <= weights.keys(), sorted(here.keys() - weights.keys())
        self.load_state_dict(weights, strict=False)


def published_training(folder: Path, task: TokenizerTask, batches: Iterator[ImageBatch]) -> Train:
    """The step of `VQModel.training_step` and `on_train_batch_end`, without Lightning around it."""
    run = task.run
    model = PublishedModel(folder, run)
    model.copy_weights(task)
    ema = published_module(folder, "ema").LitEma(model, decay=run.ema_decay)
    settings: dict[str, Any] = {"lr": run.optimizer.lr, "betas": run.optimizer.betas}
    judge = model.loss.discriminator
    generator = [p for name, p in model.named_parameters() if not name.startswith("loss.")]
    opt_gen, opt_disc = torch.optim.Adam(generator, **settings), torch.optim.Adam(judge.parameters(), **settings)

    def train() -> float:
        x = to_float(next(batches).images_u8).contiguous()
        quant, qloss, _ = model.quantize(model.quant_conv(model.encoder(x)))
        xrec = model.decoder(model.post_quant_conv(quant))
        discloss, _ = model.loss(qloss, x, xrec, 1, 0)
        opt_disc.zero_grad()
        discloss.backward()
        opt_disc.step()
        aeloss, log = model.loss(qloss, x, xrec, 0, 0)
        opt_gen.zero_grad()
        aeloss.backward()
        opt_gen.step()
        ema(model)
        return float(log["train/reconstruct_loss"])

    return train


def our_training(run: TokenizerRun, world: World) -> tuple[TokenizerTask, Train]:
    """The trainer's own task, fed with noise."""
    task = TokenizerTask(run, world, DataSets((), run.data))
    batches, step = _synthetic(run), iter(range(10**9))

    def train() -> float:
        task.set_rates(next(step) * run.train.global_batch)
        return float(task.train_step(batches).metrics["l1"])

    return task, train


def cpu_seconds() -> float:
    """Of all of this process's threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def compare(trainings: dict[str, Train], pairs: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """CPU seconds of `pairs` steps of each, by turns after one warm-up step, and each one's first L1 loss."""
    first = {name: train() for name, train in trainings.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(pairs):
        for name, train in trainings.items():
            begin = cpu_seconds()
            train()
            seconds[name].append(cpu_seconds() - begin)
    return seconds, first


def _world() -> World:
    """The one rank that this process is."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    file = Path(tempfile.mkdtemp(), "store")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    return World(0, 1, 0, torch.device("cpu"))


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.published_step", description=__doc__)
    parser.add_argument("--published", type=Path, required=True, metavar="FOLDER", help="the published code")
    parser.add_argument("--pairs", type=int, default=5, help="measured steps of each training (5)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes to tokenizer/ibq-16384 at 64×64")
    options = parser.parse_args(arguments)
    try:
        published_module(options.published, "ema")
        run = resolve("tokenizer/ibq-16384", [*SETTINGS, *options.settings]).config
    except UserError as e:
        print(f"published_step: {e}", file=sys.stderr)
        return 2
    assert isinstance(run, TokenizerRun)
    world = _world()
    with mock.patch("ibq_scale.config.deepspeed.unsharded", lambda values, *_: values):
        task, forced = our_training(run, world)
    trainings = {
        FORCED: forced,
        RESOLVED: our_training(run, world)[1],
        PUBLISHED: published_training(options.published, task, _synthetic(run)),
    }
    seconds, first = compare(trainings, options.pairs)
    base = statistics.median(seconds[PUBLISHED])
    print(f"{'training':<30}{'CPU s a step':>14}{'published ÷ it':>16}{'first L1':>12}")
    for name, spent in seconds.items():
        median = statistics.median(spent)
        print(f"{name:<30}{median:>14.2f}{base / median:>16.2f}{first[name]:>12.6f}")
    print("each step: " + "; ".join(f"{name} {' '.join(f'{s:.2f}' for s in spent)}" for name, spent in seconds.items()))
    dist.destroy_process_group()
    return int(max(first.values()) - min(first.values()) > TOLERANCE * max(first.values()))


if __name__ == "__main__":
    sys.exit(main())
