"""The sharded codebook in training: the same run on any number of ranks, in any grouping, resumed on any other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibq_scale.checkpoint.files import write_all
from ibq_scale.config.layers import resolve
from ibq_scale.config.run import TokenizerRun
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.quantize.quantizer import quantize
from ibq_scale.train.codebook import ShardedCodebook
from tests.ranks import run_ranks

STEPS, BATCH, WIDTH = 20, 24, 8
KINDS = {
    "ibq": [],
    "ibq local": ["quantizer.entropy_scope=local"],
    "clipped": ["optimizer.grad_clip=0.05"],
    "vq": ["quantizer.kind=vq"],
    "simvq": ["quantizer.kind=simvq"],
    "region": ["quantizer.kind=vq", "quantizer.region=true", "quantizer.straight_through=dynamic"],
    "region, simvq": ["quantizer.kind=simvq", "quantizer.region=true", "quantizer.straight_through=rotation"],
    "l2": ["quantizer.l2_normalize=true", "quantizer.region=true"],
    "lfq": ["quantizer.kind=lfq", "quantizer.codebook_size=256"],
    "fsq": ["quantizer.kind=fsq", "quantizer.codebook_size=256", "quantizer.levels=[2,2,2,2,2,2,2,2]"],
}
# Adam's eps is large: its step is then smooth in the gradient, and a wrong gradient's size shows.
COMMON = ("quantizer.codebook_size=32", f"quantizer.dim={WIDTH}", "quantizer.entropy_temperature=0.5")
COMMON += ("quantizer.region_window=60", "optimizer.lr=0.01", "optimizer.eps=0.01", "data.train=none", "ema_decay=0.9")


def _run(kind: str, *more: str) -> TokenizerRun:
    run = resolve("tokenizer/tiny", [*COMMON, *KINDS[kind], *more]).config
    assert isinstance(run, TokenizerRun)
    return run


class _Toy:
    """A linear encoder and decoder around the codebook, by hand: every rank holds both, their gradients averaged."""

    def __init__(self, run: TokenizerRun, world: World, uneven: bool = False) -> None:
        self.run, self.world, self.uneven = run, world, uneven
        g = torch.Generator().manual_seed(1)
        self.encoder, self.decoder = (nn.Parameter(torch.randn(WIDTH, WIDTH, generator=g)) for _ in range(2))
        self.optimizer = torch.optim.Adam([self.encoder, self.decoder], 0.01, (0.5, 0.9), 0.01)
        self.codebook = ShardedCodebook(run, world)

    def step(self, number: int, accumulation: int = 1) -> float:
        """One optimizer step on the step's own batch; returns the global loss."""
        g = torch.Generator().manual_seed(100 + number)
        total = torch.zeros(())
        for x_ND in torch.randn(BATCH, WIDTH, generator=g).chunk(accumulation):
            mine = x_ND.chunk(self.world.size)[self.world.rank]
            codes, shards = self.codebook.codes(), self.codebook.shards
            out = quantize(mine @ self.encoder, codes, self.run.quantizer, shards, age_K=self.codebook.age_K)
            loss = (out.z_q_ND @ self.decoder - mine).square().mean() + out.quantization_loss
            loss = (loss + 0.3 * out.entropy_loss) / accumulation
            loss.backward()
            total += loss.detach()
        for parameter in (self.encoder, self.decoder):
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world.size
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.codebook.step(0.01)
        dist.all_reduce(total)
        return float(total) / self.world.size


def _world(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"))


def _everything(codebook: ShardedCodebook) -> Tensor:
    """The group's codes in order."""
    rows = codebook.codes().detach().contiguous()
    parts = [torch.empty_like(rows) for _ in range(codebook.world.size)]
    dist.all_gather(parts, rows)
    return torch.cat(parts[: codebook.group_size])


def _trajectories(
    rank: int, size: int, groups: list[int], accumulation: int = 1, kinds: Iterable[str] = KINDS
) -> dict[str, Any]:
    found = {}
    for kind in kinds:
        for group in groups:
            toy = _Toy(_run(kind, f"codebook_group={group}"), _world(rank, size))
            losses = [toy.step(number, accumulation) for number in range(STEPS)]
            found[f"{kind}/{group}"] = (losses, _everything(toy.codebook))
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_one_two_and_four_ranks_follow_the_same_losses() -> None:
    one = run_ranks(_trajectories, 1, [1])[0]
    accumulated = run_ranks(_trajectories, 1, [1], 2, ["vq"])[0]
    two = run_ranks(_trajectories, 2, [1, 2])[0]
    four = run_ranks(_trajectories, 4, [2, 4])[0]
    for kind in KINDS:
        losses, codes = one[f"{kind}/1"]
        assert losses[-1] < 0.95 * losses[0], f"{kind} did not learn: {losses}"
        others = {"2 ranks": two[f"{kind}/2"], "4 ranks": four[f"{kind}/4"], "2 × 2": four[f"{kind}/2"]}
        others["2 replicas"] = two[f"{kind}/1"]
        if kind == "vq":
            # Its loss knows no batch: halves may be added up.
            others["accumulated"] = accumulated["vq/1"]
        for name, (found, rows) in others.items():
            if kind == "ibq local":
                # Each rank has a batch entropy of its own: another objective, so only the direction is the same.
                assert found[-1] < 0.95 * found[0], (kind, name)
                continue
            told = f"{kind}, {name}: {found} instead of {losses}"
            torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=2e-5, atol=2e-6, msg=told)
            torch.testing.assert_close(rows, codes, rtol=1e-4, atol=1e-5, msg=f"{kind}, {name}")


def _save(rank: int, size: int, folder: Path, kind: str) -> tuple[list[float], Tensor]:
    toy = _Toy(_run(kind), _world(rank, size))
    for number in range(3):
        toy.step(number)
    write_all(toy.codebook.state("."), folder)
    dist.barrier()
    return [toy.step(number) for number in range(3, 6)], toy.codebook.rows.detach()


def _load(rank: int, size: int, folder: Path, kind: str) -> list[float]:
    toy = _Toy(_run(kind), _world(rank, size))
    for number in range(3):
        toy.step(number)
    # Everything about the codebook is forgotten, and comes back from rows that other ranks wrote.
    toy.codebook = ShardedCodebook(_run(kind), _world(rank, size))
    toy.codebook.load(folder)
    return [toy.step(number) for number in range(3, 6)]


@pytest.mark.distributed
@pytest.mark.slow
def test_rows_written_by_four_ranks_go_on_at_one_and_two(tmp_path: Path) -> None:
    for kind, writers in (("ibq", 4), ("simvq", 4), ("region", 2)):
        folder = tmp_path / kind
        losses = run_ranks(_save, writers, folder, kind)[0][0]
        for size in (1, 2):
            found = run_ranks(_load, size, folder, kind)[0]
            assert size != writers or found == losses, kind
            torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=2e-5, atol=2e-6)
    (tmp_path / "ibq" / "rank-00001.safetensors").unlink()
    with pytest.raises(AssertionError, match="elements: the checkpoint is of another model"):
        run_ranks(_load, 2, tmp_path / "ibq", "ibq")


def _revive(rank: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    toy = _Toy(_run("vq", "codebook_group=2", "quantizer.revive_after=3"), _world(rank, size))
    toy.step(0)
    before = toy.codebook.rows.detach().clone()
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[0, 5, 16, 31]] = True
    tokens = torch.full((4, WIDTH), 1.0 + rank)
    toy.codebook.revive(dead, tokens, seed=3)
    moments = toy.codebook.optimizer.state[toy.codebook.rows]["exp_avg"]
    return before, toy.codebook.rows.detach(), moments


@pytest.mark.distributed
def test_dead_codes_become_tokens_alike_on_all_replicas() -> None:
    results = run_ranks(_revive, 4)
    for rank, (before, after, moments) in enumerate(results):
        places = [0, 5] if rank % 2 == 0 else [0, 15]
        changed = (before != after).any(dim=1).nonzero().flatten().tolist()
        assert changed == places
        # Ranks 0 and 1 are the first replicas of the two shards.
        assert torch.equal(after[places], torch.full((2, WIDTH), 1.0 + rank % 2))
        assert not moments[places].any()


def test_a_group_that_does_not_divide_the_ranks_is_refused() -> None:
    with pytest.raises(UserError, match="does not divide the 4 ranks"):
        ShardedCodebook(_run("ibq", "codebook_group=3"), _world(0, 4))
