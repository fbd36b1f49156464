"""The sharded codebook in training: rows, their Adam, their EMA, and their place on disk.

It is in no DeepSpeed engine: an engine broadcasts a plain parameter from rank 0 and averages it. This silently destroys
a shard (tried on DeepSpeed 0.19.8). Each rank of a codebook group owns K/W rows. The groups are replicas of one
another.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibq_scale.checkpoint.files import StateFile, TensorFile
from ibq_scale.checkpoint.pieces import Piece, PieceReader, piece_file
from ibq_scale.config.batch import codebook_group_size
from ibq_scale.config.run import TokenizerRun
from ibq_scale.distributed.world import World
from ibq_scale.models.optimizers import MOMENTS, adam, clipped_step, restored_state
from ibq_scale.pretrained.loading import CODEBOOK, codebook_part, codebook_to_start_from
from ibq_scale.quantize.collectives import Shards, gather_rows, own_group
from ibq_scale.quantize.kinds import KINDS
from ibq_scale.quantize.quantizer import initial_codebook, rows_of
from ibq_scale.quantize.region import initial_ages
from ibq_scale.train.simvq import Projection


class ShardedCodebook:
    """This rank's rows of the codebook, fp32 (K/W, D), with optimizer and EMA.

    For SimVQ the rows are the frozen basis, and `projection` learns. For LFQ nothing learns.
    """

    def __init__(self, run: TokenizerRun, world: World) -> None:
        self.settings = run.quantizer
        self.world = world
        self.group_size = codebook_group_size(run, world.size)
        # Groups of consecutive ranks, and the replicas of their rows.
        firsts, places = range(0, world.size, self.group_size), range(self.group_size)
        self.group = own_group([range(first, first + self.group_size) for first in firsts])
        self.replicas = own_group([range(place, world.size, self.group_size) for place in places])
        self.start, self.stop = rows_of(world.rank % self.group_size, self.group_size, self.settings.codebook_size)
        if run.init is None:
            rows = initial_codebook(self.settings, run.train.seed, self.start, self.stop)
        else:
            rows = codebook_to_start_from(run.init, self.settings)[self.start : self.stop].clone()
        learns = KINDS[self.settings.kind].learns
        self.projection = Projection(run, world) if learns == "layer" else None
        self.learns = learns == "rows"
        self.rows = nn.Parameter(rows.to(world.device), requires_grad=self.learns)
        self.optimizer = adam([self.rows], run.optimizer)
        self.grad_clip = run.optimizer.grad_clip
        self.frozen = "codebook" in run.train.freeze
        self.ema_decay = run.ema_decay
        self.ema_rows = self.rows.detach().clone()
        self.age_K = initial_ages(self.settings, len(rows), world.device) if self.settings.region else None
        """Of this rank's codes, the window of `quantizer.region`: each micro-batch updates it."""
        self._age_before_K = None if self.age_K is None else self.age_K.clone()

    @property
    def shards(self) -> Shards:
        """The layout of the codebook over the ranks, for the quantizer."""
        return Shards(self.group, self.replicas)

    def codes(self) -> Tensor:
        """This rank's codes (K/W, D) for one micro-batch, with gradient to the learned part."""
        return self.rows if self.projection is None else self.projection.codes(self.rows)

    def step(self, lr: float) -> bool:
        """One Adam step on the gradient accumulated in `rows`: the mean over ranks of their losses' gradients.

        The quantizer's backward leaves the sum over the group's ranks. Replicas then sum theirs, and the world size
        divides. False, on every rank, if the gradient is not finite. Then nothing changes. A frozen codebook stays.
        """
        if self.frozen:
            self.drop_gradient()
            return True
        applied = self._step_rows(lr) if self.projection is None else self.projection.step(lr)
        if applied:
            _copy(self.age_K, self._age_before_K)
        else:
            self.drop_gradient()
        return applied

    def _step_rows(self, lr: float) -> bool:
        if not self.learns:
            return True
        grad = self.rows.grad
        assert grad is not None, "step() follows a backward pass through the quantizer"
        if self.replicas is not None:
            dist.all_reduce(grad, group=self.replicas)
        grad.div_(self.world.size)
        square = grad.square().sum()
        if self.group is not None:
            dist.all_reduce(square, group=self.group)
        applied = clipped_step(self.optimizer, grad, square.sqrt(), self.grad_clip, lr)
        if applied:
            self.ema_rows.lerp_(self.rows.detach(), 1.0 - self.ema_decay)
        return applied

    def drop_gradient(self) -> None:
        """Drops the accumulated gradient and the choices of codes, for a skipped step."""
        self.optimizer.zero_grad(set_to_none=True)
        _copy(self._age_before_K, self.age_K)
        if self.projection is not None:
            self.projection.drop_gradient()

    @torch.no_grad()
    def revive(self, dead_K: Tensor, tokens_ND: Tensor, seed: int) -> int:
        """Replaces unused codes by tokens of this rank's batch, with fresh moments. Returns the number here.

        `dead_K`: bool over the whole codebook, the same on every rank. `tokens_ND`: the encoder's outputs. Replicas
        take the tokens of their first rank.
        """
        places = dead_K[self.start : self.stop].nonzero().flatten()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + self.start)
        drawn = torch.randint(len(tokens_ND), (len(places),), generator=generator).to(tokens_ND.device)
        fresh = tokens_ND[drawn].to(self.rows.dtype).contiguous()
        if self.replicas is not None:
            dist.broadcast(fresh, src=dist.get_global_rank(self.replicas, 0), group=self.replicas)
        self.rows[places] = fresh
        self.ema_rows[places] = fresh
        for moment in MOMENTS:
            if moment in self.optimizer.state.get(self.rows, {}):
                self.optimizer.state[self.rows][moment][places] = 0
        return len(places)

    def state(self, folder: str) -> list[StateFile]:
        """This rank's rows and moments. Replicas hold the same and give nothing."""
        if self.world.rank >= self.group_size:
            return []
        steps = float(self.optimizer.state.get(self.rows, {}).get("step", 0))
        facts = {"steps": steps, "region": self.age_K is not None}
        pieces = [*self._pieces(with_moments=steps > 0), *self._ages()]
        rows = piece_file(folder, self.world.rank, pieces, facts)
        return [rows] if self.projection is None else [rows, *self.projection.state(folder)]

    def _pieces(self, with_moments: bool) -> list[Piece]:
        """The codebook as vectors, rows end to end."""
        vectors = {"rows": self.rows.detach(), "ema_rows": self.ema_rows}
        if with_moments:
            vectors |= {moment: self.optimizer.state[self.rows][moment] for moment in MOMENTS}
        return [Piece(name, self.start * self.settings.dim, values.view(-1)) for name, values in vectors.items()]

    def _ages(self) -> list[Piece]:
        return [] if self.age_K is None else [Piece("age", self.start, self.age_K)]

    def export(self, folder: str) -> list[StateFile]:
        """This rank's averaged rows, as its part of a model directory's codebook."""
        if self.world.rank >= self.group_size:
            return []
        rows = {CODEBOOK: self._averaged_rows()}
        return [TensorFile(f"{folder}/{codebook_part(self.world.rank, self.group_size)}", rows)]

    def averages(self) -> Tensor:
        """The whole averaged codebook (K, D), fp32, as in exports. Collective."""
        return gather_rows(self._averaged_rows(), self.group)

    @torch.no_grad()
    def _averaged_rows(self) -> Tensor:
        if self.projection is not None:
            return self.projection.averaged_codes(self.rows)
        return self.ema_rows if self.ema_decay > 0 and self.learns else self.rows.detach()

    def load(self, directory: Path) -> None:
        """Reads this rank's rows from files of any group size. UserError if rows are missing."""
        reader = PieceReader(directory)
        steps = reader.facts["steps"]
        if steps:
            restored_state(self.optimizer, self.rows, steps)
        reader.read_all(self._pieces(with_moments=steps > 0))
        # The region may be new in this run.
        if reader.facts.get("region"):
            reader.read_all(self._ages())
            _copy(self.age_K, self._age_before_K)
        if self.projection is not None:
            self.projection.load(directory)


def _copy(values: Tensor | None, to: Tensor | None) -> None:
    """Of tensors that a run without `quantizer.region` does not have."""
    if values is not None and to is not None:
        to.copy_(values)
