"""SimVQ's one linear layer in training: codes = frozen basis × weightᵀ + bias (arXiv 2411.02038).

Every rank holds the whole layer, D·(D + 1) numbers, and makes its own codes from its rows of the basis.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ibq_scale.checkpoint.files import StateFile, TensorFile
from ibq_scale.config.run import TokenizerRun
from ibq_scale.distributed.world import World
from ibq_scale.models.ema import EMA
from ibq_scale.models.optimizers import MOMENTS, adam, clipped_step, restored_state

FILE = "projection.safetensors"


class Projection:
    """The layer, its optimizer and its average, with the same values on all ranks."""

    def __init__(self, run: TokenizerRun, world: World) -> None:
        self.world = world
        dim = run.quantizer.dim
        generator = torch.Generator().manual_seed(run.train.seed)
        bound = dim**-0.5
        self.parameters = {
            name: nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator).to(world.device))
            for name, shape in (("weight", (dim, dim)), ("bias", (dim,)))
        }
        self.optimizer = adam(self.parameters.values(), run.optimizer)
        self.grad_clip = run.optimizer.grad_clip
        self.ema = EMA(self.parameters, run.ema_decay)

    def codes(self, basis_KD: Tensor) -> Tensor:
        """Codes (K, D) of rows of the basis, with gradient to the layer."""
        return F.linear(basis_KD, **self.parameters)

    def averaged_codes(self, basis_KD: Tensor) -> Tensor:
        """As `codes`, from the averaged layer."""
        return F.linear(basis_KD, **self.ema.state_dict())

    def step(self, lr: float) -> bool:
        """One Adam step. Each rank's gradient is of its own shard, so their sum is the gradient of the losses' sum.

        False, on every rank, if the gradient is not finite. Then nothing changes, and `drop_gradient` follows.
        """
        grads = [parameter.grad for parameter in self.parameters.values()]
        flat = torch.cat([grad.flatten() for grad in grads if grad is not None])
        dist.all_reduce(flat)
        flat /= self.world.size
        pieces = torch.split(flat, [parameter.numel() for parameter in self.parameters.values()])
        for parameter, piece in zip(self.parameters.values(), pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        applied = clipped_step(self.optimizer, flat, flat.norm(), self.grad_clip, lr)
        if applied:
            self.ema.update(self.parameters)
        return applied

    def drop_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state(self, folder: str) -> list[StateFile]:
        """Rank 0 gives the layer, its average and its moments."""
        if not self.world.is_main:
            return []
        tensors = {}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            tensors[name] = parameter.detach()
            tensors[f"ema_{name}"] = self.ema.state_dict()[name]
            for moment in MOMENTS:
                tensors[f"{moment}_{name}"] = state.get(moment, torch.zeros_like(parameter))
            tensors[f"step_{name}"] = torch.as_tensor(float(state.get("step", 0)))
        return [TensorFile(f"{folder}/{FILE}", tensors)]

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Restores the files of `state`, on any number of ranks."""
        tensors = load_file(directory / FILE)
        self.ema.load_state_dict({name: tensors[f"ema_{name}"] for name in self.parameters})
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
            if steps := float(tensors[f"step_{name}"]):
                state = restored_state(self.optimizer, parameter, steps)
                for moment in MOMENTS:
                    state[moment].copy_(tensors[f"{moment}_{name}"])
