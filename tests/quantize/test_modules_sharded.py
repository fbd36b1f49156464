"""A sharded quantizer in plain loops of several ranks: DDP, FSDP2, none. All equal one rank with the whole batch."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ibq_scale
from ibq_scale.errors import UserError
from ibq_scale.quantize.modules import Quantizer, QuantizerOutput
from tests.ranks import run_ranks

DIM, CODES, BATCH, LENGTH = 4, 16, 8, 3
KINDS: dict[str, dict[str, Any]] = {"IBQ": {"entropy_temperature": 0.3}, "VQ": {"init_scale": 9.0}, "SimVQ": {}}


class Model(nn.Module):
    """A user's: an encoder, a quantizer and a decoder."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(DIM, DIM)
        self.decoder = nn.Linear(DIM, DIM)
        self.quantizer: Quantizer = getattr(ibq_scale, kind)(DIM, CODES, seed=3, **KINDS[kind], **options)
        self.double()

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, QuantizerOutput]:
        out = self.quantizer(self.encoder(x), mask)
        return self.decoder(out.quantized), out


def _batch(step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of 4 ranks the last has masked tokens only, and in the second step the last pair. The others differ in number."""
    g = torch.Generator().manual_seed(1 + step)
    lengths = torch.tensor([[3, 2, 3, 1, 2, 3, 0, 0], [1, 3, 2, 0, 0, 0, 0, 0]][step])
    return torch.randn(BATCH, LENGTH, DIM, generator=g, dtype=torch.float64), torch.arange(LENGTH) < lengths[:, None]


def _loss(y: torch.Tensor, out: QuantizerOutput, x: torch.Tensor, ranks: int) -> torch.Tensor:
    """Whose mean over equal batches of the ranks is that of the whole batch."""
    return out.loss + (y - x).square().sum() / BATCH * ranks


def _train(model: nn.Module, whole: Model, rows: slice, ranks: int) -> dict[str, Any]:
    """Two steps. `whole` holds the parameters."""
    optimizer = torch.optim.Adam(ibq_scale.param_groups(whole, 1e-2, 3e-2, weight_decay=0.1))
    for step in range(2):
        x, mask = (t[rows] for t in _batch(step))
        optimizer.zero_grad()
        y, out = model(x, mask)
        _loss(y, out, x, ranks).backward()
        norm = ibq_scale.clip_grad_norm_(whole, 0.5)
        optimizer.step()
    return {
        "indices": out.indices,
        "loss": out.loss.detach(),
        "usage": out.usage,
        "running": whole.quantizer.running.counts_K.clone(),
        "norm": norm,
        "encoded": whole.quantizer.encode(x, mask),
        "state": ibq_scale.whole_state_dict(whole),
    }


def _wrapped(kind: str, way: str, ranks: int) -> tuple[nn.Module, Model]:
    group: Any = dist.group.WORLD
    if way == "pairs":
        groups = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
        group = groups[dist.get_rank() // 2]
    if way == "copies":
        model = Model(kind, replica_group=group)
        return DistributedDataParallel(model), model
    model = Model(kind, codebook_group=group)
    if way == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)), ignored_params=ibq_scale.own_parameters(model))
        return model, model
    return DistributedDataParallel(ibq_scale.keep_shards_from_ddp(model)), model


def _ranks_train(rank: int, ranks: int, cases: list[tuple[str, str]]) -> list[dict[str, Any]]:
    share = BATCH // ranks
    results = []
    for kind, way in cases:
        made = _train(*_wrapped(kind, way, ranks), slice(rank * share, (rank + 1) * share), ranks)
        made["state"] = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in made["state"].items()
        }
        results.append(made)
    return results


CASES = {
    2: [("IBQ", "ddp"), ("IBQ", "fsdp"), ("IBQ", "copies"), ("VQ", "ddp"), ("SimVQ", "ddp"), ("SimVQ", "fsdp")],
    4: [("IBQ", "pairs"), ("VQ", "pairs"), ("SimVQ", "pairs")],
}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_training_equals_one_rank_with_the_whole_batch(ranks: int) -> None:
    by_rank = run_ranks(_ranks_train, ranks, CASES[ranks])
    for number, (kind, way) in enumerate(CASES[ranks]):
        whole = Model(kind)
        expected = _train(whole, whole, slice(0, BATCH), 1)
        found = [results[number] for results in by_rank]
        explain = {"msg": lambda m, k=kind, w=way: f"{k}, {w}: {m}"}
        for name in ("indices", "encoded"):
            assert torch.equal(torch.cat([f[name] for f in found]), expected[name]), (kind, way)
        torch.testing.assert_close(torch.stack([f["loss"] for f in found]).mean(), expected["loss"], **explain)
        for each in found:
            for name in ("usage", "running", "norm", "state"):
                torch.testing.assert_close(each[name], expected[name], rtol=1e-9, atol=1e-11, **explain)


def _mistakes(rank: int, ranks: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    group: Any = dist.group.WORLD
    said = {}

    def told(name: str, call: Any) -> None:
        with pytest.raises(UserError) as refused:
            call()
        said[name] = str(refused.value)

    x, mask = _batch()
    told("ddp", lambda: DistributedDataParallel(Model("IBQ", codebook_group=group))(x, mask))
    mesh = init_device_mesh("cpu", (ranks,))
    told("fsdp", lambda: fully_shard(Model("IBQ", codebook_group=mesh), mesh=mesh))
    told("odd", lambda: ibq_scale.IBQ(DIM, 15, codebook_group=group))
    told("pickle", lambda: pickle.dumps(ibq_scale.IBQ(DIM, CODES, codebook_group=group)))
    shard, whole = Model("IBQ", codebook_group=group), Model("IBQ")
    assert torch.equal(torch.cat([whole.quantizer.codebook[rank * 8 : rank * 8 + 8]]), shard.quantizer.codebook)
    told("a shard", lambda: whole.load_state_dict(shard.state_dict()))
    state = {name: value + 1 for name, value in whole.state_dict().items()}
    shard.load_state_dict(state)
    assert torch.equal(ibq_scale.whole_state_dict(shard)["quantizer.codebook"], state["quantizer.codebook"])
    # Ranks that draw their own seeds start from one codebook all the same.
    torch.manual_seed(rank)
    drawn = ibq_scale.LFQ(3, codebook_group=group), ibq_scale.IBQ(DIM, CODES, replica_group=group)
    said["drawn"] = drawn[1].codebook.detach()
    said["lfq"] = drawn[0](torch.full((2, 3), 1.0 if rank else -1.0)).usage
    return said


@pytest.mark.distributed
@pytest.mark.slow
def test_mistakes_of_several_ranks_are_told_in_words() -> None:
    first, second = run_ranks(_mistakes, 2)
    assert "DDP(keep_shards_from_ddp(model))" in first["ddp"]
    assert "ignored_params=own_parameters(model)" in first["fsdp"]
    assert "15" in first["odd"]
    assert "whole_state_dict" in first["pickle"]
    assert "whole_state_dict" in first["a shard"]
    assert torch.equal(first["drawn"], second["drawn"])
    assert first["lfq"] == second["lfq"] == 2 / 8
