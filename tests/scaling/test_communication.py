"""What is said to be sent is what ranks send: collectives of real steps, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ibq_scale.config.batch import accumulation_steps
from ibq_scale.config.deepspeed import deepspeed_config
from ibq_scale.config.layers import resolve
from ibq_scale.config.models import QuantizerConfig
from ibq_scale.config.run import ARRun
from ibq_scale.distributed.world import World
from ibq_scale.scaling.communication import Transfer, codebook_transfers, engine_transfers, muon_transfers
from ibq_scale.scaling.networks import transformer
from ibq_scale.zero.engine import COLLECTIVES
from ibq_scale.zero.memory import Zero
from tests.ranks import run_ranks
from tests.samples import SMALL_AR, write_codes

RANKS, TOKENS, CODES, DIM = 2, 24, 64, 8
# Of norms, flags and sums for metrics.
SMALL = 4096
KINDS = {"all_reduce": "all-reduce", "reduce": "reduce", "broadcast": "broadcast", "all_gather": "all-gather"}
KINDS |= {"all_gather_into_tensor": "all-gather", "reduce_scatter_tensor": "reduce-scatter"}
# With these sizes the boundary of the partitions cuts a matrix.
MUON = ("optimizer.kind=muon", "model.depth=3", "model.width=48")
KINDS |= {"all_to_all_single": "all-to-all"}


class Counted:
    """Bytes of whole tensors, by kind, of calls above `least` bytes."""

    def __init__(self, least: int = 0) -> None:
        self.bytes: Counter[str] = Counter()
        self.least = least

    def around(self, collective: Callable[..., Any], name: str) -> Callable[..., Any]:
        kind = KINDS[name]

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for a in [*args, *kwargs.values()] for t in (a if isinstance(a, list) else [a])]
            sizes = [t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)]
            # Of a list of parts the whole is their sum, of an input and an output the larger.
            whole = sum(sizes[:-1]) if isinstance(args[0] if args else None, list) else max(sizes)
            if whole > self.least:
                self.bytes[kind] += whole
            return collective(*args, **kwargs)

        return counted


def _run(codes: str, config: str, precision: str, *more: str) -> ARRun:
    words = [f"data.train={codes}", *SMALL_AR, "model.width=64", "train.global_batch=8", "train.micro_batch=2"]
    words += [f"train.precision={precision}", f"deepspeed.config={config}", "schedule.warmup_samples=0", *more]
    run = resolve("ar/tiny", words).config
    assert isinstance(run, ARRun)
    return run


def _steps(rank: int, world_size: int, codes: str, config: str, precision: str, *more: str) -> dict[str, int]:
    """Bytes of the second step: the first one also sets things up."""
    import deepspeed.comm.comm

    from ibq_scale.data.sets import open_sets
    from ibq_scale.train.ar_task import ARTask

    run = _run(codes, config, precision, *more)
    task = ARTask(run, World(rank, world_size, rank, torch.device("cpu")), open_sets(run.data, "codes"))
    batches = task.batches(0)
    task.train_step(batches)
    counted = Counted(SMALL)
    backend = deepspeed.comm.comm.cdb
    for name in COLLECTIVES:
        setattr(backend, name, counted.around(getattr(backend, name), name))
    plain = dist.batch_isend_irecv

    def exchanged(messages: list[dist.P2POp]) -> list[dist.Work]:
        sent = [m.tensor for m in messages if m.op is dist.isend]
        counted.bytes["send"] += sum(tensor.numel() * tensor.element_size() for tensor in sent)
        return plain(messages)

    dist.batch_isend_irecv = exchanged
    task.train_step(batches)
    dist.batch_isend_irecv = plain
    return dict(counted.bytes)


def _expected(transfers: list[Transfer]) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for transfer in transfers:
        sums[transfer.kind] += transfer.size * transfer.times  # type: ignore[assignment]
    return dict(sums)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "precision"),
    [("zero0", "fp32"), ("zero1", "fp32"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3", "bf16")],
)
def test_an_engine_sends_what_is_said(config: str, precision: str, tmp_path: Path) -> None:
    write_codes(tmp_path)
    run = _run(str(tmp_path), config, precision)
    assert accumulation_steps(run.train, RANKS) == 2
    zero = Zero.of(deepspeed_config(run, RANKS), world=RANKS)
    expected = _expected(engine_transfers(transformer(run), zero))
    for counted in run_ranks(_steps, RANKS, str(tmp_path), config, precision):
        assert counted == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.distributed
def test_muon_sends_what_is_said(tmp_path: Path) -> None:
    write_codes(tmp_path)
    run = _run(str(tmp_path), "zero2", "bf16", *MUON)
    zero = Zero.of(deepspeed_config(run, RANKS), world=RANKS)
    said = _expected(engine_transfers(transformer(run), zero))
    counted = run_ranks(_steps, RANKS, str(tmp_path), "zero2", "bf16", *MUON)
    assert said.pop("send") == max(rank.pop("send") for rank in counted) > 0
    for rank in counted:
        assert rank == pytest.approx(said, rel=0.05)


def test_pieces_of_a_cut_matrix_go_to_all_of_its_ranks() -> None:
    """40 elements on 4 ranks of 10. The second matrix has pieces of 1, 10, 10 and 9 elements on them."""
    (sent,) = muon_transfers([9, 30, 1], Zero(2, 4, 2, 1))
    assert (sent.sent, sent.ranks) == (2 * 10 * 3, 4)
    assert muon_transfers([10, 10, 10, 10], Zero(2, 4, 2, 1)) == []


def _quantized(rank: int, world_size: int, group_size: int) -> dict[str, int]:
    from ibq_scale.quantize import collectives
    from ibq_scale.quantize.collectives import Shards
    from ibq_scale.quantize.quantizer import quantize

    group = dist.new_group([0, 1]) if group_size == RANKS else None
    replicas = None if group_size == RANKS else dist.new_group([0, 1])
    settings = QuantizerConfig(codebook_size=CODES, dim=DIM)
    torch.manual_seed(rank)
    rows = torch.randn(CODES // group_size, DIM, requires_grad=True)
    z = torch.randn(TOKENS, DIM, requires_grad=True)
    counted = Counted()
    collectives._all_gather = counted.around(collectives._all_gather, "all_gather")  # type: ignore[assignment]
    collectives._reduce_scatter = counted.around(collectives._reduce_scatter, "reduce_scatter_tensor")  # type: ignore[assignment]
    plain, dist.all_reduce = dist.all_reduce, counted.around(dist.all_reduce, "all_reduce")
    exchange, dist.all_to_all_single = (
        dist.all_to_all_single,
        counted.around(dist.all_to_all_single, "all_to_all_single"),
    )
    found = quantize(z, rows, settings, Shards(group, replicas))
    (found.z_q_ND.square().sum() + found.quantization_loss + found.entropy_loss).backward()
    dist.all_reduce, dist.all_to_all_single = plain, exchange
    return dict(counted.bytes)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("group", [1, RANKS])
def test_the_quantizer_sends_what_is_said(group: int) -> None:
    """All but the codebook's gradient, which the step sends."""
    transfers = codebook_transfers(CODES, DIM, TOKENS, 1, group, RANKS)
    expected = _expected([t for t in transfers if t.name != "codebook's gradient"])
    for counted in run_ranks(_quantized, RANKS, group):
        for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all"):
            # A few scalars beside.
            assert counted.get(kind, 0) == pytest.approx(expected.get(kind, 0), abs=64), kind


def test_rings_send_less_than_the_whole() -> None:
    assert Transfer("x", "all-reduce", 800, 3, 4).sent == 2 * 0.75 * 800 * 3
    assert Transfer("x", "all-gather", 800, 1, 8).sent == 700


def test_sharded_traffic_grows_with_the_group_and_replicated_with_the_codebook() -> None:
    def sent(codes: int, group: int, world: int) -> float:
        return sum(t.sent for t in codebook_transfers(codes, 256, 1024, 1, group, world))

    assert sent(2**18, 64, 64) > 1.9 * sent(2**18, 32, 32)
    assert sent(2**22, 1, 64) > 3.9 * sent(2**20, 1, 64)
    assert sent(2**18, 64, 64) == pytest.approx(sent(2**22, 64, 64))
    assert codebook_transfers(2**18, 256, 1024, 1, 1, 1) == []
