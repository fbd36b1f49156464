"""The tokenizer's step in plain torch on one process, no engine, the whole codebook: what ZeRO must equal."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ibq_scale.checkpoint.pieces import Piece
from ibq_scale.config.run import TokenizerRun
from ibq_scale.distributed.world import World
from ibq_scale.losses.adversarial import LeCAM, discriminator_hinge, generator_non_saturating
from ibq_scale.models.autoencoder import TokenizerModel
from ibq_scale.models.discriminator import PatchDiscriminator
from ibq_scale.quantize.quantizer import initial_codebook


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
        o = run.optimizer
        self.g_optimizer = torch.optim.Adam([*self.model.parameters(), self.codebook_KD], o.lr, o.betas, o.eps)
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
            reconstruction, quantized = self.model(images, self.codebook_KD)
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
