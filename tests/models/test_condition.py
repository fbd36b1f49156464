"""Codes follow a prefix of vectors: hidden ones change nothing, and a cache gives what the whole pass gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ibq_scale.config.models import TransformerConfig
from ibq_scale.models.cache import KVCache
from ibq_scale.models.condition import Condition, padded
from ibq_scale.models.order import Orders
from ibq_scale.models.sampling import Sampler, SamplingSettings, generate
from ibq_scale.models.transformer import Transformer
from tests.models.noisy import CONFIG, noisy

SIZES: dict[str, Any] = {"conditioning": "embedding", "condition_tokens": 5, "condition_width": 12}
LENGTHS = [5, 2, 0]
LABELS = torch.zeros(3, dtype=torch.int64)


def _batch() -> tuple[torch.Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    rows = [torch.randn(length, 12, generator=g) for length in LENGTHS]
    return torch.randint(50, (3, 16), generator=g), padded(rows, 5)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return noisy(**SIZES)


def test_the_sizes_belong_together() -> None:
    assert TransformerConfig(**SIZES).stored()["condition_tokens"] == 5
    assert "condition_tokens" not in TransformerConfig().stored()
    for wrong in ({"conditioning": "embedding"}, {"condition_tokens": 5}, SIZES | {"condition_width": 0}):
        with pytest.raises(ValidationError, match="belong to conditioning=embedding"):
            TransformerConfig(**wrong)


def test_codes_see_the_vectors_that_count_and_no_others(model: Transformer) -> None:
    codes, condition = _batch()
    logits = model(codes, LABELS, condition)
    noise = torch.where(condition.visible()[..., None], condition.vectors_BLC, 7.0)
    torch.testing.assert_close(model(codes, LABELS, condition._replace(vectors_BLC=noise)), logits)
    other = model(codes, LABELS, condition._replace(vectors_BLC=condition.vectors_BLC.roll(1, dims=2)))
    assert not torch.isclose(other[:2], logits[:2]).all(dim=-1).any()
    # Without a condition the sample is unconditional, in a batch and alone.
    torch.testing.assert_close(logits[2:], model(codes[2:], LABELS[2:]))
    # The vectors see each other in both directions, and the codes only earlier ones.
    changed = codes.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    after = model(changed, LABELS, condition)
    torch.testing.assert_close(after[:, :8], logits[:, :8])
    assert not torch.isclose(after[:, 8:], logits[:, 8:]).all()
    shuffled = condition.vectors_BLC.clone()
    shuffled[0] = shuffled[0].flip(0)
    torch.testing.assert_close(model(codes, LABELS, condition._replace(vectors_BLC=shuffled))[0], logits[0])


@pytest.mark.parametrize("graphs", [False, True])
def test_a_cache_with_a_prefix_gives_the_same(model: Transformer, graphs: bool) -> None:
    """With `reach`, as in captured steps, and without."""
    codes, condition = _batch()
    whole = model(codes, LABELS, condition)
    cache = KVCache(model.config, 3, codes.device, torch.float32)
    for _ in range(2):
        cache.reach = 16 if graphs else None
        steps = [model.begin(LABELS, cache, condition), *(model.step(codes[:, t], cache) for t in range(15))]
        torch.testing.assert_close(torch.stack(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_guidance_is_against_no_condition(model: Transformer) -> None:
    _, condition = _batch()
    settings = SamplingSettings(guidance=3.0, greedy=True)
    sampler = Sampler(model, settings, 3, graphs=False)
    codes = sampler(LABELS, condition=condition)
    conditional, free = (model(codes, LABELS, c) for c in (condition, None))
    assert torch.equal(codes, (free + 3.0 * (conditional - free)).argmax(dim=-1))
    # The sample without a condition is the unguided one, and an image does not depend on its batch.
    assert torch.equal(codes[2:], generate(model, LABELS[2:], SamplingSettings(greedy=True)))
    assert torch.equal(codes[1:2], generate(model, LABELS[1:2], settings, condition=condition.take(torch.tensor([1]))))


def test_conditions_are_dropped_in_training() -> None:
    codes, condition = _batch()
    made = Transformer(CONFIG.model_copy(update=SIZES | {"label_dropout": 0.999999, "token_dropout": 0.0}))
    torch.nn.init.normal_(made.head.weight)
    for block in made.blocks:
        block.eval()
    torch.testing.assert_close(made(codes, LABELS, condition), made.eval()(codes, LABELS))


def test_a_prefix_goes_with_an_order(model: Transformer) -> None:
    codes, condition = _batch()
    raster = torch.arange(16).expand(3, -1)
    ordered = noisy(**SIZES, order="random")
    ordered.load_state_dict(model.state_dict(), strict=False)
    found = ordered.losses(codes, LABELS, condition, Orders(raster, torch.zeros(3)))
    assert torch.equal(found, model.losses(codes, LABELS, condition))
    assert not torch.isclose(
        ordered.losses(codes, LABELS, condition, Orders(raster.flip(1), torch.ones(3))), found
    ).all()
