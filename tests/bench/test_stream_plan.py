"""The walk of a set that is not there finds what arithmetic says, and thrash where there is."""

from __future__ import annotations

import pytest

from ibq_scale.bench.stream_plan import parse, walk
from ibq_scale.cli.main import main
from ibq_scale.config.run import DataConfig
from ibq_scale.data.geometry import Extent
from ibq_scale.errors import UserError

SMALL = Extent(shards=400, samples=8_000, bytes=4_000_000)


@pytest.mark.parametrize("nodes", [1, 8])
def test_a_planned_order_fits_and_serves_each_shard_about_once(nodes: int) -> None:
    found = walk(SMALL, DataConfig(cache_bytes=2_600_000), nodes=nodes, batch=16)
    assert found.stream.layout == (2, 64, 1)
    assert found.samples == 8_000 - 8_000 % (16 * nodes)
    assert found.in_use <= found.stream.working_set * 1.1
    assert found.again == 0
    assert found.served == pytest.approx(found.stream.traffic, abs=0.02)
    # Two nodes share few shards.
    assert found.singly <= 0.02 * (nodes > 1)


def test_the_old_order_thrashes_and_reads_all_shards_on_every_node() -> None:
    old = DataConfig(cache_bytes=1_000_000, order=1, lanes=64, window=4)
    assert walk(SMALL, old, nodes=1, batch=16).again > 1_000
    roomy = walk(SMALL, old.model_copy(update={"cache_bytes": 4_000_000}), nodes=8, batch=16)
    assert roomy.again == 0
    assert roomy.served > 1.9


def test_nodes_beyond_the_lanes_share_shards() -> None:
    found = walk(SMALL, DataConfig(lanes=8, window=1), nodes=16, batch=4)
    assert found.served == pytest.approx(1.5, abs=0.1)


def test_a_set_is_written_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("141e9-bytes,551-shards,1281167-samples") == Extent(551, 1_281_167, 141 * 10**9)
    for wrong in ("551-shards", "5-shards,1-samples,9-bytes", "many-shards,1-samples,9-bytes"):
        with pytest.raises(UserError, match="write it as 551-shards"):
            parse(wrong)
    assert main(["bench", "data", "--simulate", "40-shards,4000-bytes,800-samples", "--nodes", "2"]) == 0
    assert "800 samples in 40 shards" in capsys.readouterr().out
    assert main(["bench", "data"]) == 2
