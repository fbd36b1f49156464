"""Codes one at a time: guided, drawn or likeliest, the same ones however they are batched, captured or not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibq_scale.models.cache import KVCache
from ibq_scale.models.sampling import Sampler, SamplingSettings, _keep_nucleus, _pick, generate
from ibq_scale.models.transformer import Transformer
from tests.models.noisy import CONFIG, noisy

VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "prefix": {"conditioning": "prefix"},
    "grouped, normed": {"heads": 4, "kv_heads": 2, "qk_norm": True},
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return noisy()


@pytest.mark.parametrize(
    "settings",
    [SamplingSettings(seed=3), SamplingSettings(guidance=2.5, temperature=0.9, top_k=20, top_p=0.9, seed=3)],
)
def test_an_image_does_not_depend_on_its_batch(model: Transformer, settings: SamplingSettings) -> None:
    labels = torch.tensor([0, 1, 2, 3, 4])
    together = generate(model, labels, settings)
    ids = torch.tensor([3, 1])
    apart = generate(model, labels[ids], settings, ids)
    assert torch.equal(apart, together[ids])
    assert not torch.equal(generate(model, labels, SamplingSettings(seed=4)), together)


def test_greedy_takes_the_likeliest(model: Transformer) -> None:
    labels = torch.tensor([2, 4])
    codes = generate(model, labels, SamplingSettings(greedy=True))
    assert torch.equal(model(codes, labels).argmax(dim=-1), codes)
    assert torch.equal(generate(model, labels, SamplingSettings(top_k=1, seed=9)), codes)


def test_guidance_is_a_line_through_both_logits(model: Transformer) -> None:
    labels = torch.tensor([1])
    codes = generate(model, labels, SamplingSettings(guidance=3.0, greedy=True))
    with_class, without = model(codes, labels), model(codes, torch.tensor([5]))
    assert torch.equal((without + 3.0 * (with_class - without)).argmax(dim=-1), codes)


def test_samples_follow_the_distribution(model: Transformer) -> None:
    """First codes of many images against the model's own probabilities (chi-square, 49 degrees: 99.9 % below 85)."""
    count = 4000
    labels = torch.zeros(count, dtype=torch.int64)
    cache = KVCache(CONFIG, 1, labels.device, torch.float32)
    expected = model.begin(labels[:1], cache).softmax(dim=-1)[0].detach() * count
    short = Transformer(CONFIG.model_copy(update={"tokens": 1})).eval()
    short.load_state_dict(model.state_dict())
    seen = torch.bincount(generate(short, labels, SamplingSettings(seed=0)).flatten(), minlength=50)
    assert float(((seen - expected) ** 2 / expected).sum()) < 85


def test_top_p_and_top_k_leave_out_the_unlikely(model: Transformer) -> None:
    labels = torch.zeros(200, dtype=torch.int64)
    cache = KVCache(CONFIG, 1, labels.device, torch.float32)
    p = model.begin(labels[:1], cache).softmax(dim=-1)[0]
    ordered = p.sort(descending=True)
    nucleus = set(ordered.indices[: int((ordered.values.cumsum(0) < 0.5).sum()) + 1].tolist())
    short = Transformer(CONFIG.model_copy(update={"tokens": 1})).eval()
    short.load_state_dict(model.state_dict())
    assert set(generate(short, labels, SamplingSettings(top_p=0.5)).flatten().tolist()) <= nucleus
    best = set(ordered.indices[:3].tolist())
    assert set(generate(short, labels, SamplingSettings(top_k=3)).flatten().tolist()) == best


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"guidance_power": 0}]
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="sampling needs"):
        SamplingSettings(**wrong)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_step_of_static_shapes_sees_the_keys_that_are_there(changes: dict[str, Any]) -> None:
    model, labels = noisy(**changes), torch.tensor([0, 1, 5])
    codes = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config, 3, labels.device, torch.float32)
    # Keys of an earlier batch, which no step may see.
    model.begin(labels.roll(1), cache)
    for t in range(15):
        model.step(codes[:, 15 - t], cache)
    steps = []
    for t in range(16):
        cache.reach = 8 if t < 8 else 16
        steps.append(model.begin(labels, cache) if t == 0 else model.step(codes[:, t - 1], cache))
    torch.testing.assert_close(torch.stack(steps, dim=1), model(codes, labels), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_one_compiled_step_serves_every_place(model: Transformer) -> None:
    """Without a break of its graph, and without compiling again as the cache fills: what a CUDA graph needs too."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    block = torch.compile(lambda *args: model.blocks[1](*args), backend=backend, fullgraph=True, dynamic=False)
    cache = KVCache(CONFIG, 4, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model.begin(torch.tensor([3, 0, 5, 5]), cache)
        cache.clear()
        cache.reach = 16
        x_BTE = torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(0))
        for t in range(4):
            table = model._table_on(x_BTE.device).index_select(1, cache.position_1)[None]
            for layer in range(3):
                part = cache.layer(layer, cache.slots(1))
                arguments = (x_BTE, cache.kept[1], table, part, "sdpa", cache.visible())
                assert torch.equal(block(*arguments), model.blocks[1](*arguments)), (t, layer)
            cache.advance()
    assert len(compiled) == 1


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: steps are captured as CUDA graphs there"
)
@pytest.mark.parametrize("settings", [SamplingSettings(greedy=True, guidance=2.0), SamplingSettings(top_k=9, seed=3)])
def test_captured_steps_pick_the_same_codes(settings: SamplingSettings) -> None:
    model = noisy().cuda()
    captured = Sampler(model, settings, 3)
    for labels in (torch.tensor([0, 1, 2]), torch.tensor([4, 3, 0])):
        assert torch.equal(captured(labels), generate(model, labels, settings))


def test_a_sampler_forgets_the_batch_before(model: Transformer) -> None:
    settings = SamplingSettings(guidance=2.0, seed=1)
    sampler, labels = Sampler(model, settings, 2), torch.tensor([4, 0])
    sampler(torch.tensor([1, 2]), torch.tensor([8, 9]))
    assert torch.equal(sampler(labels), generate(model, labels, settings))


def test_images_of_one_place_and_different_classes_draw_different_numbers(model: Transformer) -> None:
    """Two classes that the model cannot tell apart."""
    twins = noisy()
    table = twins.class_emb.embedding_table.weight
    table.data[1] = table.data[0]
    codes = generate(twins, torch.tensor([0, 1]), SamplingSettings(seed=1), torch.tensor([5, 5]))
    assert not torch.equal(codes[0], codes[1])


@given(st.integers(2, 400), st.floats(1.0, 20.0), st.floats(0.2, 4.0))
def test_schedules_rise_from_no_guidance_to_all_of_it(tokens: int, guidance: float, power: float) -> None:
    def at(schedule: Any) -> list[float]:
        made = SamplingSettings(guidance, guidance_schedule=schedule, guidance_power=power)
        return made.guidance_at(tokens)

    assert at("constant") == [guidance] * tokens
    linear, cosine = at("linear"), at("power-cosine")
    assert linear[-1] == pytest.approx(guidance)
    assert linear[0] == pytest.approx(1 + (guidance - 1) / tokens)
    assert cosine[0] == 1.0
    for values in (linear, cosine):
        assert values == sorted(values)
        assert 1.0 <= values[0] <= values[-1] <= guidance + 1e-9
    if power == 1.0:
        assert cosine[tokens // 2] == pytest.approx(1 + (guidance - 1) * math.sin(math.pi / 4) ** 2, abs=guidance / 2)


def test_scheduled_guidance_is_each_steps_own(model: Transformer) -> None:
    settings = SamplingSettings(guidance=4.0, greedy=True, guidance_schedule="linear")
    labels = torch.tensor([1])
    codes = generate(model, labels, settings)
    with_class, without = model(codes, labels), model(codes, torch.tensor([5]))
    scale = torch.tensor(settings.guidance_at(16))[None, :, None]
    assert torch.equal((without + scale * (with_class - without)).argmax(dim=-1), codes)
    drawn = [
        generate(model, labels, SamplingSettings(guidance=4.0, guidance_schedule=s)) for s in ("constant", "linear")
    ]
    assert not torch.equal(*drawn)


@pytest.mark.slow
@given(st.integers(0, 2**31), st.integers(1, 60), st.floats(0.01, 1.0))
def test_the_nucleus_is_the_smallest_that_reaches_top_p(seed: int, codes: int, top_p: float) -> None:
    logits = 3 * torch.randn(4, codes, generator=torch.Generator().manual_seed(seed))
    kept = _keep_nucleus(logits, top_p).isfinite()
    p = logits.softmax(dim=-1)
    for row in range(4):
        mass, least = float(p[row][kept[row]].sum()), float(p[row][kept[row]].min())
        assert mass >= top_p - 1e-5
        assert mass - least < top_p + 1e-5
        left_out = p[row][~kept[row]]
        assert bool((left_out <= least).all())


@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0, 0.9999))
def test_what_is_picked_is_one_of_the_top_k(seed: int, top_k: int, uniform: float) -> None:
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(seed))
    picked = _pick(logits, torch.full((3,), uniform, dtype=torch.float64), SamplingSettings(top_k=top_k))
    best = logits.topk(top_k, dim=-1).indices
    assert (best == picked[:, None]).any(dim=-1).all()
