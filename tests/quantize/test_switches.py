"""The switches past IBQ against dense twins in float64, whole and on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.collectives import WHOLE, Shards
from ibq_scale.quantize.quantizer import encode, initial_codebook, lookup, quantize, rows_of
from ibq_scale.quantize.region import initial_ages, region_loss
from tests.quantize.dense import dense
from tests.ranks import run_ranks

TOKENS, CODES, DIM = 24, 32, 4
CASES: dict[str, dict[str, Any]] = {
    "dynamic": {"kind": "vq", "straight_through": "dynamic"},
    "rotation": {"kind": "simvq", "straight_through": "rotation", "beta_on": "commitment"},
    "region": {"kind": "vq", "region": True},
    "region, ibq": {"kind": "ibq", "region": True, "beta_on": "commitment"},
    "l2": {"kind": "ibq", "l2_normalize": True},
    "l2 with a temperature, region": {"kind": "ibq", "l2_normalize": True, "temperature": 0.5, "region": True},
    "l2, vq": {"kind": "vq", "l2_normalize": True},
    "all": {"kind": "simvq", "l2_normalize": True, "straight_through": "dynamic", "region": True},
}


def _settings(name: str, **more: Any) -> QuantizerConfig:
    plain = {"codebook_size": CODES, "dim": DIM, "batch_entropy_weight": 0.0, "sample_entropy_weight": 0.0}
    return QuantizerConfig(**{**plain, "region_window": 40, "tile_bytes": 1500, **CASES[name], **more})


def _inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens near few of the codes, rows, upstream gradients, and the ages of codes before the batch."""
    g = torch.Generator().manual_seed(seed)
    rows_KD = torch.randn(CODES, DIM, generator=g, dtype=torch.float64)
    z_ND = rows_KD[torch.randint(8, (TOKENS,), generator=g)] * 1.5
    z_ND = z_ND + 0.2 * torch.randn(TOKENS, DIM, generator=g, dtype=torch.float64)
    age_K = torch.randint(41, (CODES,), generator=g)
    return z_ND, rows_KD, torch.randn(TOKENS, DIM, generator=g, dtype=torch.float64), age_K


def _expected(name: str, sizes: list[int]) -> tuple[Tensor, ...]:
    """z_q, indices, and the gradients of Σ (rank + 1) × the loss of each rank."""
    settings = _settings(name)
    z_ND, rows_KD, upstream_ND, age_K = _inputs()
    z_ND.requires_grad_(), rows_KD.requires_grad_()
    out = dense(z_ND, rows_KD, settings, age_K + TOKENS < settings.region_window)
    parts = zip((out.z_q_ND * upstream_ND).split(sizes), out.loss_N.split(sizes), strict=True)
    total = sum((rank + 1.0) * (z_q.sum() + 0.7 * (loss.mean() + out.region)) for rank, (z_q, loss) in enumerate(parts))
    assert isinstance(total, Tensor)
    return out.z_q_ND.detach(), out.indices_N, *torch.autograd.grad(total, [z_ND, rows_KD])


def _found(name: str, rank: int, sizes: list[int], shards: Shards, part: tuple[int, int]) -> tuple[Tensor, ...]:
    z_ND, rows_KD, upstream_ND, age_K = (x.split(sizes)[rank] if len(x) == TOKENS else x for x in _inputs())
    start, stop = rows_of(*part, CODES)
    z_ND, rows_KD = z_ND.clone().requires_grad_(), rows_KD[start:stop].clone().requires_grad_()
    out = quantize(z_ND, rows_KD, _settings(name), shards, age_K=age_K[start:stop].clone())
    ((rank + 1.0) * ((out.z_q_ND * upstream_ND).sum() + 0.7 * out.quantization_loss)).backward()
    assert z_ND.grad is not None
    assert rows_KD.grad is not None
    return out.z_q_ND.detach(), out.indices_N, z_ND.grad, rows_KD.grad


@pytest.mark.parametrize("name", CASES)
def test_a_switch_is_its_formula_differentiated(name: str) -> None:
    expected, found = _expected(name, [TOKENS]), _found(name, 0, [TOKENS], WHOLE, (0, 1))
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


SIZES = {2: [15, 9], 4: [6, 6, 6, 6]}


def _on_ranks(rank: int, world: int) -> dict[str, tuple[Tensor, ...]]:
    """Each case on one group of all ranks, and for four ranks on two groups of two."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])] if world == 4 else []
    found = {}
    for name in CASES:
        shards = Shards(dist.group.WORLD, sizes=SIZES[world])
        found[name] = _found(name, rank, SIZES[world], shards, (rank, world))
        if world == 4:
            shards = Shards(pairs[rank // 2], pairs[2 + rank % 2])
            found[f"{name}, replicas"] = _found(name, rank, SIZES[world], shards, (rank % 2, 2))
    return found


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_switch_on_ranks_is_the_whole(world: int) -> None:
    by_rank = run_ranks(_on_ranks, world)
    for name in CASES:
        expected = _expected(name, SIZES[world])
        for case, copies in ((name, 1), (f"{name}, replicas", 2)):
            if case not in by_rank[0]:
                continue
            z_q, indices, grad_z, grad_rows = zip(*(rank[case] for rank in by_rank), strict=True)
            # Replicas hold the same rows, in turn.
            rows = torch.stack([torch.cat(grad_rows[i:][: world // copies]) for i in range(0, world, world // copies)])
            found = (torch.cat(z_q), torch.cat(indices), torch.cat(grad_z), rows.sum(dim=0))
            for left, right in zip(found, expected, strict=True):
                torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11, msg=lambda m, c=case: f"{c}: {m}")


def test_region_takes_any_tile_and_any_number_of_free_codes() -> None:
    settings = _settings("region")
    for seed in range(12):
        z_ND, rows_KD, _, _ = _inputs(seed)
        rows_KD.requires_grad_()
        window = torch.arange(CODES) < (0, 12, 31, 32)[seed % 4]
        indices_N = encode(z_ND, rows_KD, settings)
        expected = dense(z_ND, rows_KD, settings, window)
        losses = []
        for tile_bytes in (1, 3000, None):
            tiled = settings.model_copy(update={"tile_bytes": tile_bytes})
            age_K = torch.where(window, 0, settings.region_window)
            losses.append(0.25 * region_loss(z_ND, rows_KD, indices_N, tiled, WHOLE, age_K))
        (grad_KD,) = torch.autograd.grad(expected.region, rows_KD)
        for loss in losses:
            torch.testing.assert_close(loss, expected.region)
            torch.testing.assert_close(torch.autograd.grad(loss, rows_KD)[0], grad_KD)


def test_equally_near_codes_are_claimed_from_the_lowest_index_on() -> None:
    settings = QuantizerConfig(kind="vq", codebook_size=8, dim=2, region=True, beta_on="commitment")
    rows_KD = torch.tensor([[4.0, 0.0], [0.0, 4.0]] + [[1.0, 1.0]] * 6, requires_grad=True)
    quantize(rows_KD.detach()[[0, 0, 1, 1]], rows_KD, settings).quantization_loss.backward()
    assert rows_KD.grad is not None
    # Two sources with quotas of 3 take the same three codes: their target is (2, 2), and five codes have a target.
    assert torch.equal(rows_KD.grad, torch.tensor([[0.0, 0.0]] * 2 + [[-0.2, -0.2]] * 3 + [[0.0, 0.0]] * 3))


def test_the_window_counts_tokens_since_a_code_was_chosen() -> None:
    settings = QuantizerConfig(kind="vq", codebook_size=4, dim=1, region=True, region_window=5)
    rows_KD = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    age_K = initial_ages(settings, 4)
    seen = []
    for token in (0.0, 1.0, 1.0, 1.0):
        quantize(torch.full((2, 1), token), rows_KD, settings, age_K=age_K)
        seen.append(age_K.tolist())
    assert seen == [[0, 5, 5, 5], [2, 0, 5, 5], [4, 0, 5, 5], [5, 0, 5, 5]]


def test_weights_are_one_at_the_nearest_token_and_on_the_code() -> None:
    settings = QuantizerConfig(kind="vq", codebook_size=2, dim=1, straight_through="dynamic")
    rows_KD = torch.tensor([[0.0], [10.0]])
    z_ND = torch.tensor([[1.0], [2.0], [10.0], [11.0]], requires_grad=True)
    quantize(z_ND, rows_KD, settings).z_q_ND.sum().backward()
    assert z_ND.grad is not None
    assert z_ND.grad.flatten().tolist() == [1.0, 0.25, 1.0, 0.0]


def test_a_rotation_of_tokens_without_direction_or_opposite_is_finite() -> None:
    settings = QuantizerConfig(kind="vq", codebook_size=1, dim=2, straight_through="rotation")
    z_ND = torch.tensor([[0.0, 0.0], [-3.0, 0.0]], requires_grad=True)
    out = quantize(z_ND, torch.tensor([[1.0, 0.0]]), settings)
    assert torch.equal(out.z_q_ND, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    out.z_q_ND.sum().backward()
    assert z_ND.grad is not None
    assert z_ND.grad.isfinite().all()
    assert torch.equal(z_ND.grad[0], torch.ones(2))


@pytest.mark.parametrize("kind", ["ibq", "vq"])
def test_unit_codes_are_the_same_in_training_search_and_lookup(kind: str) -> None:
    settings = QuantizerConfig(kind=kind, codebook_size=CODES, dim=DIM, l2_normalize=True)
    rows_KD = initial_codebook(settings, 0, 0, CODES) * torch.linspace(0.1, 9, CODES)[:, None]
    z_ND = torch.randn(200, DIM, generator=torch.Generator().manual_seed(1)) * 7
    out = quantize(z_ND, rows_KD, settings)
    assert torch.equal(
        out.indices_N,
        torch.nn.functional.normalize(z_ND).matmul(initial_codebook(settings, 0, 0, CODES).T).argmax(dim=1),
    )
    assert torch.equal(out.indices_N, encode(z_ND, rows_KD, settings))
    codes_ND = lookup(out.indices_N, rows_KD, settings=settings)
    torch.testing.assert_close(codes_ND, out.z_q_ND)
    torch.testing.assert_close(codes_ND.norm(dim=1), torch.ones(200))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "ibq", "straight_through": "dynamic"}, "ibq has a gradient of its own, through softmax"),
        ({"kind": "lfq", "straight_through": "rotation"}, "lfq has a gradient of its own, through its rounding"),
        ({"kind": "lfq", "region": True}, "region is for kind=ibq, vq and simvq: the codes of lfq are fixed"),
        ({"kind": "lfq", "l2_normalize": True}, "l2_normalize is for kind=ibq, vq and simvq"),
        ({"kind": "vq", "l2_normalize": True, "temperature": 0.1}, "temperature is for kind=ibq with l2_normalize"),
        ({"kind": "ibq", "temperature": 0.1}, "temperature is for kind=ibq with l2_normalize"),
    ],
)
def test_a_switch_is_refused_where_it_means_nothing(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        QuantizerConfig(codebook_size=16, dim=4, **values)
