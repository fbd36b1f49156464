"""The quantizers as modules: shapes, masks, errors, levels, groups, and whatever a foreign loop does with a module."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ibq_scale
from ibq_scale import FSQ, IBQ, LFQ, VQ, ProductQuantizer, ResidualQuantizer, SimVQ
from ibq_scale.quantize.ibq import ibq_dense
from ibq_scale.quantize.modules import Quantizer, QuantizerOutput


def _one_of_each(**options: Any) -> list[Quantizer]:
    return [
        IBQ(6, 32, seed=0, **options),
        VQ(6, 32, seed=0, init_scale=32.0, **options),
        SimVQ(6, 32, seed=0, **options),
        LFQ(6, **options),
        FSQ(levels=[5, 3, 3], **options),
    ]


def _z(quantizer: Any, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, quantizer.dim, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _gradients(quantizer: nn.Module, z: torch.Tensor, out: QuantizerOutput) -> list[torch.Tensor]:
    learned = [p for p in quantizer.parameters() if p.requires_grad]
    return list(torch.autograd.grad(out.loss + (out.quantized * 0.3).square().sum(), [z, *learned]))


def test_the_module_is_the_oracle_with_a_loss() -> None:
    quantizer = IBQ(6, 32, seed=0, entropy_temperature=0.3).double()
    z = _z(quantizer, 2, 3, 5).detach().double().requires_grad_()
    out = quantizer(z)
    dense = ibq_dense(z.reshape(-1, 6), quantizer.codebook, quantizer.settings)
    torch.testing.assert_close(out.quantized, dense.z_q_ND.view_as(z))
    torch.testing.assert_close(out.loss, dense.quantization_loss + 0.05 * dense.entropy_loss)
    assert torch.equal(out.loss, sum(out.parts.values()))
    assert torch.equal(out.indices, dense.indices_N.view(2, 3, 5))
    expected = dense.quantization_loss + 0.05 * dense.entropy_loss + (dense.z_q_ND * 0.3).square().sum()
    grads = torch.autograd.grad(expected, [z, quantizer.codebook])
    for ours, theirs in zip(_gradients(quantizer, z, out), grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_shapes_statistics_and_codes_there_and_back() -> None:
    for quantizer in _one_of_each():
        z = _z(quantizer, 2, 7)
        out = quantizer(z)
        assert out.quantized.shape == z.shape
        assert out.indices.shape == (2, 7)
        assert out.indices.dtype == torch.int64
        assert torch.equal(quantizer.encode(z), out.indices)
        torch.testing.assert_close(quantizer.decode(out.indices), out.quantized.detach(), rtol=1e-5, atol=1e-6)
        counts = out.indices.flatten().bincount(minlength=quantizer.codes)
        assert float(out.usage) == pytest.approx(float((counts > 0).double().mean()))
        p = counts[counts > 0].double() / counts.sum()
        assert float(out.perplexity) == pytest.approx(float((-(p * p.log()).sum()).exp()))
        quantizer(z)
        assert torch.equal(quantizer.running.counts_K, 2 * counts)
        quantizer.eval()(z)
        assert torch.equal(quantizer.running.counts_K, 2 * counts)
        quantizer.running.reset()
        assert quantizer.running.usage == 0.0
        assert quantizer(z[0, 0]).indices.shape == ()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (IBQ, {"region": True}),
        (IBQ, {"l2_normalize": True}),
        (VQ, {"straight_through": "dynamic"}),
        (SimVQ, {"straight_through": "rotation", "region": True}),
    ],
)
def test_the_trainers_switches_are_keywords(kind: type[Quantizer], settings: dict[str, Any]) -> None:
    quantizer = (
        kind(16, 256, seed=0, region_window=100, **settings) if "region" in settings else kind(16, 256, **settings)
    )
    z = torch.randn(2, 30, 16)
    out = quantizer(z)
    assert torch.equal(quantizer.encode(z), out.indices)
    assert torch.allclose(quantizer.decode(out.indices), out.quantized, atol=1e-6)
    if "region" in settings:
        chosen = quantizer.age.clone()
        assert (chosen < 100).sum() == len(out.indices.unique())
        quantizer.eval()(torch.randn(2, 30, 16))
        assert torch.equal(quantizer.age, chosen)


def test_channels_may_come_first() -> None:
    first, last = IBQ(6, 32, seed=0, channel_first=True), IBQ(6, 32, seed=0)
    z = _z(last, 2, 3, 4)
    a, b = first(z.movedim(-1, 1)), last(z)
    assert torch.equal(a.quantized.movedim(1, -1), b.quantized)
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(first.decode(a.indices), a.quantized)


def test_masked_tokens_have_no_part() -> None:
    """The loss, statistics and gradients are those of the real tokens alone, also of none."""
    for quantizer in _one_of_each():
        z = _z(quantizer, 3, 5)
        mask = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
        real = z.detach()[mask].requires_grad_()
        with torch.no_grad():
            z[~mask] = float("nan")
        masked, alone = quantizer(z, mask), quantizer(real)
        assert torch.equal(masked.indices[mask], alone.indices)
        assert bool((masked.indices[~mask] == -1).all())
        assert bool((masked.quantized[~mask] == 0).all())
        for name in ("loss", "usage", "perplexity", "sample_entropy", "batch_entropy"):
            assert torch.equal(getattr(masked, name), getattr(alone, name)), name
        grads, expected = _gradients(quantizer, z, masked), _gradients(quantizer, real, alone)
        torch.testing.assert_close(grads[0][mask], expected[0])
        assert bool((grads[0][~mask] == 0).all())
        torch.testing.assert_close(grads[1:], expected[1:])
        assert torch.equal(quantizer.encode(z, mask), masked.indices)
        torch.testing.assert_close(quantizer.decode(masked.indices), masked.quantized.detach(), rtol=1e-5, atol=1e-6)
        for nothing in (quantizer(real, torch.zeros(len(real), dtype=torch.bool)), quantizer(real[:0])):
            assert float(nothing.loss.detach()) == float(nothing.usage) == float(nothing.perplexity) == 0.0
            assert all(bool((g == 0).all()) for g in _gradients(quantizer, real, nothing))


def test_half_precision_autocast_and_checkpointing() -> None:
    for quantizer in _one_of_each():
        z = _z(quantizer, 4, 3)
        plain = quantizer(z)
        grads = _gradients(quantizer, z, plain)
        with torch.autocast("cpu", torch.bfloat16):
            cast = quantizer(z)
            assert torch.equal(cast.loss, plain.loss)
            # torch runs a linear layer's backward pass under autocast, where that is called so.
            inside = None if isinstance(quantizer, SimVQ) else _gradients(quantizer, z, cast)
        for ours, theirs in zip(inside or _gradients(quantizer, z, cast), grads, strict=True):
            assert torch.equal(ours, theirs)
        quantizer.running.reset()
        again = checkpoint(quantizer, z, use_reentrant=False)
        for ours, theirs in zip(_gradients(quantizer, z, again), grads, strict=True):
            assert torch.equal(ours, theirs)
        assert int(quantizer.running.counts_K.sum()) == 12
        for dtype in (torch.bfloat16, torch.float16):
            out = quantizer(z.to(dtype))
            assert out.quantized.dtype == dtype
            assert out.loss.dtype == torch.float32
        quantizer.to(torch.bfloat16)
        assert quantizer(z.bfloat16()).loss.isfinite()


@pytest.mark.slow
def test_one_graph_under_compile() -> None:
    for quantizer in _one_of_each()[:2]:
        z = _z(quantizer, 4, 3)
        plain = quantizer(z)
        quantizer.running.reset()
        torch.compiler.reset()
        compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)(z)
        assert torch.equal(compiled.indices, plain.indices)
        torch.testing.assert_close(_gradients(quantizer, z, compiled), _gradients(quantizer, z, plain))
        assert int(quantizer.running.counts_K.sum()) == 12


def test_copies_pickles_and_states() -> None:
    for quantizer in _one_of_each():
        z = _z(quantizer, 5)
        indices = quantizer(z).indices
        fresh = copy.deepcopy(quantizer)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        fresh.load_state_dict(quantizer.state_dict())
        for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), fresh):
            assert torch.equal(other(z).indices, indices)
            assert torch.equal(other.running.counts_K[indices].sign(), torch.ones_like(indices))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: IBQ(8, 32)(torch.zeros(2, 6)), "dim=8 takes (…, dim), got (2, 6)"),
        (lambda: IBQ(8, 32)(torch.zeros(2, 8, 3)), "channel_first=True"),
        (lambda: IBQ(8, 32, channel_first=True)(torch.zeros(2, 3, 8)), "channel_first=False"),
        (lambda: IBQ(8, 32)(torch.zeros(2, 8, dtype=torch.int64)), "float dtype, got torch.int64"),
        (lambda: IBQ(8, 32)(torch.zeros(2, 8), torch.ones(2)), "a mask is bool of shape (2,)"),
        (lambda: IBQ(8, 32)(torch.full((2, 8), torch.nan)), "z holds NaN"),
        (lambda: IBQ(8, 32).decode(torch.tensor([3, 32])), "codes 0 to 31"),
        (lambda: IBQ(8, 32).decode(torch.tensor([3.0])), "int64"),
        (lambda: IBQ(8, 0), "codes"),
        (lambda: IBQ(8, 32, betta=1.0), "did you mean 'beta'?"),
        (lambda: IBQ(8, codes=32, codebook_size=4), "did you mean 'codes'?"),
        (lambda: IBQ(8, 32, beta=-1.0), "beta"),
        (lambda: IBQ(8, 32, codebook_group="all"), "process group"),
        (lambda: LFQ(dim=4, codes=15), "2^dim = 16"),
        (lambda: LFQ(), "needs dim"),
        (lambda: FSQ(dim=3), "needs levels"),
        (lambda: FSQ(dim=3, codes=7), "no 3 levels"),
        (lambda: FSQ(levels=[8, 5], codes=41), "codes=40"),
        (lambda: IBQ(8, 32).load_state_dict(IBQ(8, 16).state_dict()), "(16, 8)"),
        (lambda: IBQ(8, 32).load_state_dict({}), "no 'codebook'"),
        (lambda: ResidualQuantizer(IBQ, dim=8, codes=32), "number of levels"),
        (lambda: ResidualQuantizer(IBQ(8, 32), 2, sizes=[1, 2, 4]), "2 levels and 3 sizes"),
        (lambda: ResidualQuantizer(IBQ(8, 32), sizes=[1, 2])(torch.zeros(1, 3, 3, 8)), "last size is 2"),
        (lambda: ProductQuantizer(IBQ(8, 32), 2)(torch.zeros(1, 8)), "16 dimensions"),
        (lambda: ibq_scale.param_groups(nn.Linear(2, 2), 1e-3), "no quantizer"),
        (lambda: ibq_scale.param_groups(LFQ(4), 1e-3), "codebook to train"),
    ],
)
def test_wrong_use_is_told_at_once(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        call()


def test_the_shorter_forms_of_grids() -> None:
    assert LFQ(codes=1024).dim == 10
    assert FSQ(dim=4, codes=1000).settings.levels == (8, 5, 5, 5)
    assert FSQ(3, 512).settings.levels == (8, 8, 8)


def test_the_codebook_has_a_rate_of_its_own_and_no_decay() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "a": IBQ(4, 8), "b": SimVQ(4, 8)})
    rest, codebooks = ibq_scale.param_groups(model, 1e-4, 1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    assert (rest["lr"], rest["weight_decay"], len(rest["params"])) == (1e-4, 0.1, 2)
    assert (codebooks["lr"], codebooks["weight_decay"], len(codebooks["params"])) == (1e-3, 0.0, 3)
    torch.optim.AdamW([rest, codebooks])
    z = torch.randn(5, 4)
    (model["a"](z).loss + model["b"](model["encoder"](z)).loss).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = ibq_scale.clip_grad_norm_(model, 0.01)
    torch.testing.assert_close(norm.float(), torch.nn.utils.get_total_norm(grads))
    torch.testing.assert_close(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])), 0.01)


def test_levels_correct_what_is_left_over() -> None:
    torch.manual_seed(0)
    for levels in (ResidualQuantizer(VQ, 3, dim=6, codes=64, init_scale=64.0), ResidualQuantizer(IBQ(6, 64), 3)):
        z = _z(levels, 4, 5)
        out = levels(z)
        assert out.indices.shape == (4, 5, 3)
        assert torch.equal(levels.encode(z), out.indices)
        torch.testing.assert_close(levels.decode(out.indices), out.quantized.detach(), rtol=1e-5, atol=1e-6)
        steps = levels.decode_levels(out.indices[..., :2])
        torch.testing.assert_close(steps[0], out.levels[0].quantized.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(levels(z, levels=2).quantized.detach(), steps[1], rtol=1e-5, atol=1e-6)
        assert torch.equal(out.loss, torch.stack([level.loss for level in out.levels]).mean())
        assert torch.equal(out.loss.detach(), sum(part.detach() for part in out.parts.values()))
    vq = ResidualQuantizer(VQ, 3, dim=6, codes=64, init_scale=64.0)
    z, upstream = _z(vq, 4, 5), torch.randn(4, 5, 6)
    mask = torch.rand(4, 5) > 0.3
    out = vq(z, mask)
    assert torch.equal(torch.autograd.grad((out.quantized * upstream).sum(), z)[0], upstream * mask[..., None])
    errors = [float((z - vq(z, levels=n).quantized).square().mean().detach()) for n in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)


def test_scales_are_those_of_var() -> None:
    """Against VAR's algorithm 1, written out."""
    scales = ResidualQuantizer(VQ(6, 64, init_scale=64.0, seed=0, channel_first=True), sizes=[1, 2, (4, 4)])
    z = _z(scales, 2, 4, 4).detach().movedim(-1, 1).requires_grad_()
    out = scales(z)
    rest, codes = z.detach().clone(), torch.zeros_like(z)
    for level, side in enumerate((1, 2, 4)):
        small = nn.functional.interpolate(rest, size=(side, side), mode="area")
        hard = scales[level].decode(scales[level].encode(small))
        assert torch.equal(scales[level].encode(small), out.indices[level])
        up = hard if side == 4 else nn.functional.interpolate(hard, size=(4, 4), mode="bicubic")
        rest, codes = rest - up, codes + up
    torch.testing.assert_close(out.quantized, codes)
    torch.testing.assert_close(scales.decode(out.indices), codes)
    assert len(list(scales.parameters())) == 1
    upstream = torch.randn_like(z)
    assert torch.equal(torch.autograd.grad((out.quantized * upstream).sum(), z)[0], upstream)
    sound = ResidualQuantizer(IBQ, sizes=[2, 8], dim=6, codes=64)
    assert [i.shape for i in sound(torch.randn(3, 8, 6)).indices] == [(3, 2), (3, 8)]


def test_groups_of_dimensions() -> None:
    groups = ProductQuantizer(IBQ, 2, dim=3, codes=16)
    z = _z(groups, 4, 5)
    out = groups(z)
    assert out.indices.shape == (4, 5, 2)
    assert torch.equal(groups.encode(z), out.indices)
    assert torch.equal(groups.decode(out.indices), out.quantized)
    assert torch.equal(out.quantized[..., 3:], groups[1](z[..., 3:]).quantized)
    nested = ResidualQuantizer(lambda: ProductQuantizer(IBQ, 2, dim=3, codes=16), 2)
    assert nested(z).indices.shape == (4, 5, 2, 2)


@pytest.mark.slow
def test_import_needs_neither_deepspeed_nor_the_compiler() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); from ibq_scale import IBQ; IBQ(4, 8)(torch.zeros(2, 4)); "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before if name[0] != '_'}), "
        "'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *packages, compiler = done.stdout.split()
    assert not {"deepspeed", "torchvision", "omegaconf", "yaml", "s3fs", "triton"} & set(packages)
    assert compiler == "False"
