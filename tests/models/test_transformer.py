"""The transformer predicts each code from those before it and the label, with a cache as without."""

from __future__ import annotations

import pytest
import torch

from ibq_scale.config.models import TransformerConfig
from ibq_scale.models.sampling import SamplingSettings, generate
from ibq_scale.models.transformer import KVCache, Transformer

CONFIG = TransformerConfig(codebook_size=50, classes=5, tokens=16, depth=3, heads=2, width=32, adaln_gain_init=1.0)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    made = Transformer(CONFIG)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randint(50, (4, 16), generator=g), torch.tensor([0, 1, 2, 5])


def test_no_code_sees_itself_or_a_later_one(model: Transformer, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    codes, labels = batch
    before = model(codes, labels)
    changed = codes.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    after = model(changed, labels)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_step_by_step_with_a_cache_equals_all_at_once(
    model: Transformer, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    codes, labels = batch
    whole = model(codes, labels)
    cache = KVCache(CONFIG, 4, codes.device, torch.float32)
    steps = [model.step(None if t == 0 else codes[:, t - 1], labels, cache) for t in range(16)]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_every_attention_gives_the_same(model: Transformer, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    other = Transformer(CONFIG.model_copy(update={"attention": "sdpa_math"})).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(*batch), model(*batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conditioning", ["adaln", "prefix"])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(
    batch: tuple[torch.Tensor, torch.Tensor], checkpointing: str, conditioning: str
) -> None:
    """Dropout is on: what is computed again draws the same."""
    gradients = []
    for how in ("none", checkpointing):
        update = {"activation_checkpointing": how, "conditioning": conditioning}
        made = Transformer(CONFIG.model_copy(update=update))
        torch.manual_seed(0)
        torch.nn.init.normal_(made.head.weight, std=0.1)
        made(*batch).square().mean().backward()
        gradients.append([p.grad for p in made.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_label_dropout_replaces_labels_by_no_class(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    made = Transformer(CONFIG.model_copy(update={"label_dropout": 0.999999})).train()
    rows = made.class_emb(batch[1])
    assert torch.equal(rows, made.class_emb.embedding_table.weight[[5] * 4])


def test_the_first_forward_is_uniform() -> None:
    """The head starts at zero: the loss starts at ln V."""
    logits = Transformer(CONFIG)(torch.zeros(1, 16, dtype=torch.int64), torch.tensor([0]))
    assert torch.equal(logits, torch.zeros_like(logits))


def test_on_the_meta_device_it_has_sizes_and_no_numbers(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    with torch.device("meta"):
        made = Transformer(CONFIG)
        logits = made(*(t.to("meta") for t in batch))
    assert {p.device.type for p in made.parameters()} == {"meta"}
    assert (logits.shape, logits.device.type) == ((4, 16, 50), "meta")


def test_the_head_reads_the_hidden_states(model: Transformer, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(model.head(model.hidden(*batch)), model(*batch))


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
    expected = model.step(None, labels[:1], cache).softmax(dim=-1)[0].detach() * count
    short = Transformer(CONFIG.model_copy(update={"tokens": 1})).eval()
    short.load_state_dict(model.state_dict())
    seen = torch.bincount(generate(short, labels, SamplingSettings(seed=0)).flatten(), minlength=50)
    assert float(((seen - expected) ** 2 / expected).sum()) < 85


def test_top_p_and_top_k_leave_out_the_unlikely(model: Transformer) -> None:
    labels = torch.zeros(200, dtype=torch.int64)
    cache = KVCache(CONFIG, 1, labels.device, torch.float32)
    p = model.step(None, labels[:1], cache).softmax(dim=-1)[0]
    ordered = p.sort(descending=True)
    nucleus = set(ordered.indices[: int((ordered.values.cumsum(0) < 0.5).sum()) + 1].tolist())
    short = Transformer(CONFIG.model_copy(update={"tokens": 1})).eval()
    short.load_state_dict(model.state_dict())
    assert set(generate(short, labels, SamplingSettings(top_p=0.5)).flatten().tolist()) <= nucleus
    best = set(ordered.indices[:3].tolist())
    assert set(generate(short, labels, SamplingSettings(top_k=3)).flatten().tolist()) == best


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="sampling needs"):
        SamplingSettings(**wrong)
