"""The transformer predicts each code from those before it and the label, with a cache as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from ibq_scale.config.layers import resolve
from ibq_scale.config.run import ARRun
from ibq_scale.models.cache import KVCache
from ibq_scale.models.initial import CHUNK, Normal
from ibq_scale.models.transformer import Transformer
from tests.models.noisy import CONFIG, noisy

VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "prefix": {"conditioning": "prefix"},
    "grouped": {"heads": 4, "kv_heads": 2},
    "one head of keys, normed": {"heads": 4, "kv_heads": 1, "qk_norm": True},
    "prefix, grouped, normed": {"conditioning": "prefix", "heads": 4, "kv_heads": 2, "qk_norm": True},
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return noisy()


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


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_step_by_step_with_a_cache_equals_all_at_once(
    changes: dict[str, Any], batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    codes, labels = batch
    model = noisy(**changes)
    whole = model(codes, labels)
    cache = KVCache(model.config, 4, codes.device, torch.float32)
    steps = [model.begin(labels, cache), *(model.step(codes[:, t], cache) for t in range(15))]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
    # The label is heard, through the prefix or everywhere.
    assert not torch.allclose(model(codes, labels.roll(1)), whole)


def test_a_cache_of_grouped_heads_is_smaller() -> None:
    def size(**changes: Any) -> int:
        return KVCache(CONFIG.model_copy(update=changes), 4, torch.device("cpu"), torch.float32).nbytes

    assert size(heads=8, kv_heads=2) * 4 == size(heads=8)


def _llamagen(weights: dict[str, torch.Tensor], codes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """LlamaGen's forward pass written out with complex rotations, 2 heads of 16."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]

    frequency = 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[:15]
    turn = torch.polar(torch.ones(15, 8), torch.cat([places[:, :1] * frequency, places[:, 1:] * frequency], dim=1))
    turn = torch.cat([torch.zeros(1, 8, dtype=turn.dtype), turn])[:, None]
    x = torch.cat(
        [
            weights["class_emb.embedding_table.weight"][labels][:, None],
            weights["tok_emb.weight"][codes[:, :-1]],
        ],
        dim=1,
    )
    later = torch.ones(16, 16, dtype=torch.bool).triu(1)
    for i in range(3):
        block = f"blocks.{i}"
        q, k, v = (norm(x, f"{block}.attention_norm") @ weights[f"{block}.attention.wqkv.weight"].T).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (2, 16)) for t in (q, k, v))
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (8, 2))) * turn).flatten(-2) for t in (q, k))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / 4.0
        mixed = torch.einsum("bhts,bshd->bthd", scores.masked_fill(later, -torch.inf).softmax(-1), v).flatten(-2)
        x = x + mixed @ weights[f"{block}.attention.wo.weight"].T
        h = norm(x, f"{block}.ffn_norm")
        w1, w2, w3 = (weights[f"{block}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        x = x + (F.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return norm(x, "head_nm.rmsnorm") @ weights["head.weight"].T


def test_the_prefix_backbone_is_llamagens(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = noisy(conditioning="prefix")
    expected = _llamagen(dict(model.named_parameters()), *batch)
    torch.testing.assert_close(model(*batch), expected, rtol=1e-4, atol=1e-4)


def test_query_and_key_are_normed_by_head(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """So their length in wqkv no longer matters."""
    model = noisy(qk_norm=True)
    before = model(*batch)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.wqkv.weight[:32] *= 100.0
    torch.testing.assert_close(model(*batch), before, rtol=1e-3, atol=1e-3)


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


@pytest.mark.slow
def test_selective_checkpointing_multiplies_nothing_twice_and_keeps_less(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    flops, kept = {}, {}
    for how in ("none", "selective", "full"):
        made = Transformer(CONFIG.model_copy(update={"activation_checkpointing": how, "width": 256}))
        with profile(profile_memory=True) as profiled:
            hidden = made.hidden(*batch)
        kept[how] = sum(event.self_cpu_memory_usage for event in profiled.events())
        with FlopCounterMode(display=False) as counter:
            hidden.sum().backward()
        flops[how] = counter.get_total_flops()
    assert flops["selective"] == flops["none"] < flops["full"]
    assert kept["full"] < kept["selective"] < 0.6 * kept["none"]


def test_the_first_weights_are_a_function_of_name_and_seed() -> None:
    first, again, other = (dict(Transformer(CONFIG, seed=s).named_parameters()) for s in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tok_emb.weight"], other["tok_emb.weight"])
    deeper = dict(Transformer(CONFIG.model_copy(update={"depth": 4}), seed=1).named_parameters())
    assert all(torch.equal(first[name], deeper[name]) for name in first)


@pytest.mark.parametrize("conditioning", ["adaln", "prefix"])
def test_the_first_weights_have_the_published_deviations(conditioning: str) -> None:
    changes = {"width": 256, "adaln_gain_init": 1e-3, "conditioning": conditioning, "qk_norm": True}
    for name, weight in Transformer(CONFIG.model_copy(update=changes)).requires_grad_(False).named_parameters():
        if name == "head.weight" or name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            parts = [(weight, 0.02)]
            if "ada_lin" in name:
                gains = 512 if name.startswith("blocks") else 0
                parts = [(weight[gains:], 0.01)] + ([(weight[:gains], 2e-5)] if gains else [])
            for part, std in parts:
                assert float(part.std()) == pytest.approx(std, rel=0.03), name
                assert abs(float(part.mean())) < 0.05 * std, name


def test_weights_are_drawn_in_any_pieces() -> None:
    size = 2 * CHUNK + 1000
    normal = Normal(size, 0.02, mean=1.0, first=CHUNK + 7, first_std=2.0)
    whole = normal.elements("a", 0, size)
    for start, length in ((0, 5), (CHUNK - 3, 20), (CHUNK, CHUNK), (2 * CHUNK - 1, 1001), (size - 1, 1)):
        assert torch.equal(normal.elements("a", start, length), whole[start : start + length])
    assert float(whole[: CHUNK + 7].std()) == pytest.approx(2.0, rel=0.01)
    assert float(whole[CHUNK + 7 :].std()) == pytest.approx(0.02, rel=0.01)
    assert not torch.equal(whole[:1000], whole[2 * CHUNK :])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compiled_blocks_share_a_graph_and_give_the_same_gradients(
    batch: tuple[torch.Tensor, torch.Tensor], checkpointing: str
) -> None:
    still = {f"{name}_dropout": 0.0 for name in ("token", "residual", "ffn", "label")}
    changes = still | {"activation_checkpointing": checkpointing, "kv_heads": 1}
    plain, compiled = noisy(**changes).train(), noisy(**changes).train()
    torch._dynamo.reset()
    counters.clear()
    compiled.compile_regions()
    for model in (plain, compiled):
        model(*batch).logsumexp(-1).mean().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    found = dict(compiled.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)


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


MILLIONS = {"b": 342, "l": 649, "xl": 1076, "xxl": 2063, "3b": 3147, "7b": 6918}
MILLIONS |= {"llamagen-b": 111, "llamagen-l": 343, "llamagen-xl": 775, "llamagen-xxl": 1411}


@pytest.mark.slow
@pytest.mark.parametrize("codes", [16384, 262144])
@pytest.mark.parametrize("name", MILLIONS)
def test_every_preset_runs_on_the_meta_device(name: str, codes: int) -> None:
    """Training's forward and backward pass, shapes only; ours are 3b and 7b."""
    run = resolve(name, [f"model.codebook_size={codes}"], "ar").config
    assert isinstance(run, ARRun)
    assert run.model.head_dim in (64, 128)
    with torch.device("meta"):
        made = Transformer(run.model)
        logits = made(torch.zeros(2, 256, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
        assert logits.shape == (2, 256, codes)
        logits.sum().backward()
    count = sum(p.numel() for p in made.parameters()) - 2 * (codes - 16384) * run.model.width
    assert count / 1e6 == pytest.approx(MILLIONS[name], rel=0.005)


def test_the_head_reads_the_hidden_states(model: Transformer, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(model.head(model.hidden(*batch)), model(*batch))
