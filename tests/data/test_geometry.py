"""Lanes and window fit the cache at any size, and what does not fit is refused with numbers that do."""

from __future__ import annotations

import pytest

from ibq_scale.config.run import DataConfig
from ibq_scale.data.geometry import Extent, Layout, Stream, chosen, continued, layout, require_fit, working_set
from ibq_scale.errors import UserError

GB, MB = 10**9, 1 << 20
IMAGENET = 1_281_167, 141 * GB


def _extent(samples: int, size: int, shard: int) -> Extent:
    return Extent(-(-size // shard), samples, size)


@pytest.mark.parametrize("shard", [32 * MB, 64 * MB, 128 * MB, 256 * MB])
@pytest.mark.parametrize(("samples", "size"), [IMAGENET, (14_000_000, 1_500 * GB), (400_000_000, 44_000 * GB)])
def test_the_shards_in_use_fit_half_of_the_default_cache(samples: int, size: int, shard: int) -> None:
    extents = [_extent(samples, size, shard)]
    found = layout(DataConfig(), extents)
    assert working_set(extents, found) <= DataConfig().cache_bytes // 2
    assert found.lanes == 128 if shard <= 64 * MB else found.lanes >= 32


def test_each_source_of_a_mixture_has_its_lanes() -> None:
    one, two = _extent(*IMAGENET, 64 * MB), _extent(14_000_000, 1_500 * GB, 64 * MB)
    assert chosen([one, two], 50 * GB) < chosen([one], 50 * GB)
    assert working_set([one, two], Layout(2, *chosen([one, two], 50 * GB))) <= 25 * GB


def test_a_set_that_fits_whole_is_mixed_the_most() -> None:
    assert chosen([_extent(10_000, GB, 64 * MB)], 50 * GB) == (128, 4)


def test_what_the_config_names_is_taken_and_the_rest_is_chosen_for_it() -> None:
    extents = [_extent(*IMAGENET, 64 * MB)]
    assert layout(DataConfig(lanes=8), extents) == (2, 8, 4)
    assert layout(DataConfig(window=4), extents) == (2, 64, 4)
    assert layout(DataConfig(lanes=500, window=9), extents) == (2, 500, 9)


def test_nodes_share_the_shards_in_use_and_the_store_serves_each_once() -> None:
    extents, data = [_extent(*IMAGENET, 64 * MB)], DataConfig()
    streams = {nodes: Stream.of(extents, data, data.cache_bytes, 256, nodes) for nodes in (1, 8, 128)}
    assert all(stream.traffic <= 1.05 for stream in streams.values())
    assert streams[8].working_set * 8 == pytest.approx(streams[1].working_set)
    old = Stream.of(extents, DataConfig(order=1), data.cache_bytes, 256, 8)
    assert (old.layout, old.traffic) == (Layout(1, 64, 4), 8)
    # A batch, and an index of each shard that it reads of.
    assert streams[1].first_batch < 4 * 256 * 110_000
    assert str(streams[1]) == (
        "order 2: 128 lanes, windows of 1 shard; 17.17 GB in use a node, 50.00 GB of cache; "
        f"{streams[1].first_batch / 1e6:.2f} MB before the first batch, the store serves 141.00 GB an epoch"
    )


def test_more_in_use_than_the_cache_holds_is_refused_with_what_fits() -> None:
    extents = [_extent(*IMAGENET, 256 * MB)]
    wide = Layout(2, 64, 4)
    with pytest.raises(UserError, match=r"85\.\d\d GB of shards are in use at once") as told:
        require_fit(extents, wide, 50 * GB, 1)
    assert "data.lanes=32 data.window=1" in str(told.value)
    require_fit(extents, Layout(2, 32, 1), 50 * GB, 1)
    require_fit(extents, wide, 50 * GB, 8)
    with pytest.raises(UserError, match="or prepare the data in shards of 29 MB"):
        require_fit(extents, Layout(2, 8, 1), GB, 1)
    fits = [_extent(*IMAGENET, 29 * MB)]
    require_fit(fits, Layout(2, *chosen(fits, GB)), GB, 1)


def test_a_run_under_an_old_order_goes_on_though_it_does_not_fit() -> None:
    require_fit([_extent(*IMAGENET, 256 * MB)], Layout(1, 64, 4), 50 * GB, 1)


def test_a_checkpoints_layout_is_kept() -> None:
    extents = [_extent(*IMAGENET, 64 * MB)]
    before_versions = {"lanes": 64, "window": 4}
    assert layout(continued(DataConfig(), before_versions), extents) == Layout(1, 64, 4)
    assert layout(continued(DataConfig(cache_bytes=1), {"order": 2, "lanes": 16, "window": 3}), extents) == (2, 16, 3)
