"""Past one machine: times from volumes and links, against numbers by hand; where more GPUs stop paying."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from ibq_scale.cli.main import main
from ibq_scale.config.layers import resolve
from ibq_scale.errors import UserError
from ibq_scale.scaling.communication import Transfer
from ibq_scale.scaling.devices import DEVICES, named
from ibq_scale.scaling.fabric import LINK_SHARE, NDR, NET_LATENCY, NODE_LATENCY, Fabric
from ibq_scale.scaling.roofline import MEMORY, PRODUCTS, GpuWork, step_time
from ibq_scale.scaling.simulate import PAYS, best_groups, codebook_rows, ends, refused_stages, transformer_rows
from ibq_scale.zero.memory import Zero

H100 = DEVICES["H100"]
FABRIC = Fabric.of(H100, 8)


def test_links_of_a_node_and_between_nodes() -> None:
    assert (FABRIC.link, FABRIC.net) == (450e9, NDR)
    here = Transfer("x", "all-gather", 8e9, 1, 8)
    assert FABRIC.seconds(here, 8) == pytest.approx(7e9 / (LINK_SHARE * 450e9) + 3 * NODE_LATENCY)
    # Eight cards a node carry what eight GPUs' rings send: 400 GB/s.
    wide = Transfer("x", "all-reduce", 8e9, 1, 64)
    hops = 3 * NODE_LATENCY + 3 * NET_LATENCY
    assert FABRIC.seconds(wide, 64) == pytest.approx(2 * 63 / 64 * 8e9 / (LINK_SHARE * 400e9) + 2 * hops)


def test_replicas_share_a_nodes_cards_with_the_other_rings() -> None:
    one_a_node = Transfer("x", "all-reduce", 8e9, 1, 8, spread=True)
    assert FABRIC.seconds(one_a_node, 64) == pytest.approx(2 * 7 / 8 * 8e9 / (LINK_SHARE * 50e9) + 6 * NET_LATENCY)
    # Of groups of two a node holds four replicas, and two such rings.
    four_a_node = Transfer("x", "all-gather", 8e9, 1, 32, spread=True)
    expected = 31 / 32 * 8e9 / (LINK_SHARE * 200e9) + 2 * NODE_LATENCY + 3 * NET_LATENCY
    assert FABRIC.seconds(four_a_node, 64) == pytest.approx(expected)


def test_the_slower_of_products_and_memory_is_the_time_of_the_passes() -> None:
    zero = Zero(1, 8, 2, 2)
    transfers = [Transfer("x", "all-gather", 8e9, 1, 8)]
    busy = step_time(GpuWork(1e12, 1e6, 10**9), zero, H100, FABRIC, transfers, 16)
    assert busy.passes == busy.products == pytest.approx(16e12 / (PRODUCTS * 989.4e12))
    assert busy.optimizer == pytest.approx((28 + 2) * 1e9 / 8 / (MEMORY * 3350e9))
    assert busy.exposed == busy.exchange == pytest.approx(FABRIC.seconds(transfers[0], 8))
    assert busy.total == pytest.approx(busy.passes + busy.optimizer + busy.exchange)
    moving = step_time(GpuWork(1e9, 1e9, 10**9), zero, H100, FABRIC, transfers, 16)
    assert moving.passes == moving.memory == pytest.approx((4 * 16e9 + 3 * 2 * 1e9 * 2) / (MEMORY * 3350e9))
    hidden = step_time(GpuWork(1e12, 1e6, 10**9), zero, H100, FABRIC, transfers, 16, overlap=True)
    assert hidden.exposed == pytest.approx(max(0.0, busy.exchange - 2 / 3 * busy.passes))


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    return transformer_rows(resolve("ar/b", ["train.micro_batch=32"]).config, H100, FABRIC, 1024)


def test_strong_scaling_stops_paying_and_weak_does_not(rows: list[Any]) -> None:
    def of(mode: str, stage: int) -> list[Any]:
        return [r for r in rows if (r.mode, r.stage) == (mode, stage)]

    for stage in (1, 2, 3):
        strong, weak = of("strong", stage), of("weak", stage)
        assert [r.gpus for r in weak] == [8, 16, 32, 64, 128, 256, 512, 1024]
        assert [r.gpus for r in strong] == [8, 16, 32, 64, 128, 256], "512 do not divide a batch of 768"
        assert all(r.micro_batch * r.accumulation * r.gpus == 768 for r in strong)
        assert strong[0].pays
        assert not strong[-1].pays
        for before, after in itertools.pairwise(strong):
            assert after.pays == (before.pays and after.images_per_s >= PAYS * before.images_per_s)
            assert after.efficiency < before.efficiency
        assert weak[-1].pays
        # States are shared by more.
        assert weak[-1].peak < weak[0].peak
    # Each micro-batch's gradients anew, against once a step.
    assert of("strong", 2)[0].time.exchange > 2 * of("strong", 1)[0].time.exchange
    assert of("weak", 3)[-1].time.exchange > of("weak", 1)[-1].time.exchange


@pytest.mark.slow
def test_slower_networks_pay_less(rows: list[Any]) -> None:
    slow = transformer_rows(resolve("ar/b", ["train.micro_batch=32"]).config, H100, replace(FABRIC, net=1e9), 1024)
    for fast_row, slow_row in zip(rows, slow, strict=True):
        assert slow_row.images_per_s <= fast_row.images_per_s
        if fast_row.gpus > 8:
            assert slow_row.efficiency < 0.8 * fast_row.efficiency


def test_a_codebook_is_shared_by_as_many_as_pay() -> None:
    found = codebook_rows(resolve("tokenizer/ibq-262144", ["train.micro_batch=4"]).config, H100, FABRIC, 1024, 20e9)
    at = {(r.codes, r.gpus, r.group): r for r in found}
    assert {r.codes for r in found} == {2**14, 2**16, 2**18, 2**20, 2**22}
    # Few codes: copies are cheap. Many: shards, and over more ranks; all ranks of many are too many.
    best = {(r.codes, r.gpus): r.group for r in best_groups(found)}
    assert best[2**14, 1024] == 1
    assert 1 < best[2**18, 1024] < best[2**22, 1024] < 1024
    assert best[2**22, 64] == 64
    assert at[2**22, 8, 8].bytes < 0.2 * at[2**22, 8, 1].bytes
    # A rank hears of its own tokens from all shards, and of all tokens once: no more than the tokens themselves grow.
    assert at[2**14, 1024, 1024].exchange == pytest.approx(2 * at[2**14, 512, 512].exchange, rel=0.05)
    assert at[2**22, 64, 1].products == at[2**22, 64, 64].products
    full = codebook_rows(resolve("tokenizer/ibq-262144", ["train.micro_batch=4"]).config, H100, FABRIC, 8, 70e9)
    assert {r.group for r in full if r.codes == 2**22 and r.fits} == {8}, "21 GB of copies have no room there"


def test_what_has_no_tables_is_refused() -> None:
    with pytest.raises(UserError, match="is a tokenizer"):
        transformer_rows(resolve("tokenizer/tiny").config, H100, FABRIC, 16)
    with pytest.raises(UserError, match="is a transformer"):
        codebook_rows(resolve("ar/tiny").config, H100, FABRIC, 16, 0.0)
    with pytest.raises(UserError, match="fp32"):
        transformer_rows(resolve("ar/tiny").config, H100, FABRIC, 16)
    with pytest.raises(UserError, match="kind vq: only IBQ's codebook"):
        codebook_rows(resolve("tokenizer/tiny", ["quantizer.kind=vq"]).config, H100, FABRIC, 16, 0.0)
    words = ["train.precision=bf16", "model.fp8=true"]
    with pytest.raises(UserError, match=r"capability 8\.9 or more, not A100"):
        transformer_rows(resolve("ar/tiny", words).config, DEVICES["A100"], FABRIC, 16)


@pytest.mark.parametrize("setting", ["optimizer.kind=muon", "model.compile=true"])
def test_stages_that_training_refuses_have_no_rows(setting: str) -> None:
    run = resolve("ar/tiny", ["train.precision=bf16", "model.depth=1", setting]).config
    rows = transformer_rows(run, H100, FABRIC, 8)
    assert {row.stage for row in rows} == {1, 2}
    assert {stage for _, stage, _ in ends(rows)} == {1, 2}
    assert list(refused_stages(run)) == [3]


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scale", "simulate", "ar/tiny", "train.precision=bf16", "--device", "h100", "--gpus", "4", "--most", "8"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "ASSUMED: products at 60 %" in said
    assert "strong scaling, ZeRO-3" in said
    assert "pays up to" in said
    assert main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["pays_up_to"]) == 6
    assert main([*words[:5], "mi300x"]) == 2
    assert "not in the table" in capsys.readouterr().err
    assert main([*words, "--net", "0"]) == 2
    assert named("h100") is H100
