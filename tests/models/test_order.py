"""Random orders see what raster order sees: a target, the codes before it in the order, and their places."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ibq_scale.models.cache import KVCache
from ibq_scale.models.order import Orders, draw_orders
from ibq_scale.models.transformer import Transformer
from tests.models.noisy import CONFIG, noisy

RASTER = torch.arange(16).expand(3, -1)


def _batch() -> tuple[torch.Tensor, torch.Tensor, Orders]:
    g = torch.Generator().manual_seed(1)
    orders = draw_orders(0, [5, 6, 7], [1.0, 1.0, 1.0], 16)
    return torch.randint(50, (3, 16), generator=g), torch.tensor([0, 1, 5]), orders


def test_orders_are_a_function_of_seed_and_position() -> None:
    whole, scales = draw_orders(3, list(range(64)), [0.5] * 64, 16)
    parts = [draw_orders(3, [p], [0.5], 16).places_BT for p in range(63, -1, -1)]
    assert torch.equal(whole, torch.cat(parts[::-1]))
    assert torch.equal(whole.sort(dim=1).values, torch.arange(16).expand(64, -1))
    random = (whole != torch.arange(16)).any(dim=1)
    assert 20 < int(random.sum()) < 44
    assert len(whole[random].unique(dim=0)) == int(random.sum())
    # The embedding fades for samples in raster order.
    assert torch.equal(scales, torch.where(random, 1.0, 0.5))
    # A sample keeps its permutation while its probability falls, and has none at the end.
    certain = draw_orders(3, list(range(64)), [1.0] * 64, 16).places_BT
    assert torch.equal(whole[random], certain[random])
    places, scales = draw_orders(3, [1, 2], [0.0, 0.0], 16)
    assert torch.equal(places, RASTER[:2])
    assert not scales.any()
    assert not torch.equal(certain, draw_orders(4, list(range(64)), [1.0] * 64, 16).places_BT)


def test_raster_order_is_the_plain_model_to_the_last_bit() -> None:
    """At scale 0, in losses and in every gradient. The embedding's own gradient is exactly zero."""
    codes, labels, _ = _batch()
    plain, other = noisy().train(), noisy(order="random").train()
    gradients = []
    for model, orders in ((plain, None), (other, Orders(RASTER, torch.zeros(3)))):
        torch.manual_seed(0)
        model.losses(codes, labels, orders=orders).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    embedding = gradients[1].pop("order_emb.weight")
    assert embedding is not None
    assert not embedding.any()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        found = gradients[1][name]
        assert gradient is not None
        assert found is not None
        assert torch.equal(gradient, found), name


def test_a_step_sees_its_label_its_target_and_the_codes_before_it() -> None:
    codes, labels, orders = _batch()
    places, step = orders.places_BT, 6
    model = noisy(order="random")
    before = model.losses(codes, labels, orders=orders)
    here = places[:, step : step + 1]
    changed = codes.scatter(1, here, (codes.gather(1, here) + 1) % 50)
    after = model.losses(changed, labels, orders=orders)
    assert torch.equal(before[:, :step], after[:, :step])
    assert (before[:, step + 1 :] != after[:, step + 1 :]).all()
    # Two orders that part at a step predict other codes there.
    swapped = places.clone()
    swapped[:, [step, step + 1]] = places[:, [step + 1, step]]
    two = (orders, orders._replace(places_BT=swapped))
    hidden, other = (model.hidden(codes.gather(1, o.places_BT), labels, orders=o) for o in two)
    assert torch.equal(hidden[:, :step], other[:, :step])
    assert not torch.isclose(hidden[:, step], other[:, step]).all(dim=-1).any()


def test_a_target_sees_other_codes_at_the_angles_of_raster_order() -> None:
    """Attention scores of one target with one earlier code depend on neither's step."""
    from ibq_scale.models.order import permuted_tables
    from ibq_scale.models.rotary import rotary_table, rotate

    table, orders = rotary_table(CONFIG), _batch()[2].places_BT
    x = torch.randn(1, 1, 1, CONFIG.head_dim, generator=torch.Generator().manual_seed(0)).expand(3, 16, 1, -1)

    def scores(orders: torch.Tensor) -> torch.Tensor:
        queries, keys = (rotate(x, tables) for tables in permuted_tables(table, orders))
        scores_BTS = torch.einsum("bthd,bshd->bts", queries, keys)
        # By target and raster successor of the input.
        by_place = torch.full((3, 16, 17), torch.nan)
        rows = torch.arange(3)[:, None, None]
        by_place[rows, orders[:, :, None], F.pad(orders[:, :-1] + 1, (1, 0))[:, None, :]] = scores_BTS
        return by_place

    raster, permuted = scores(RASTER), scores(orders)
    both = ~raster.isnan() & ~permuted.isnan()
    # A query of code 0 in the middle of an order turns too.
    both[:, 0] = False
    assert both[:, 1:, 1:].sum() > 3 * 15 * 13
    torch.testing.assert_close(permuted[both], raster[both], rtol=1e-4, atol=1e-4)


def test_raster_order_is_one_of_the_orders() -> None:
    """At once and step by step, with the embedding's rows of raster order."""
    codes, labels, _ = _batch()
    model = noisy(order="random")
    whole = model(codes, labels)
    found = model.head(model.hidden(codes, labels, orders=Orders(RASTER, torch.ones(3))))
    assert torch.equal(found, whole)
    cache = KVCache(model.config, 3, codes.device, torch.float32)
    steps = [model.begin(labels, cache), *(model.step(codes[:, t], cache) for t in range(15))]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, noisy()(codes, labels))


def test_all_of_a_model_but_its_order_embedding_is_the_raster_models() -> None:
    plain, other = (
        dict(Transformer(CONFIG.model_copy(update={"order": o})).named_parameters()) for o in ("raster", "annealed")
    )
    assert other.pop("order_emb.weight").shape == (16, 32)
    assert all(torch.equal(plain[name], other[name]) for name in plain.keys() | other.keys())
