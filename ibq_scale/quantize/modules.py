"""The quantizers as modules for any model: `ibq_scale.IBQ`, `VQ`, `SimVQ`, `LFQ`, `FSQ`. docs/library.md is their page.

They are the trainer's functions (`quantizer.py`) with a shape, a mask, a codebook that a plain optimizer trains, and a
placement over ranks without the trainer.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.errors import UserError
from ibq_scale.quantize.collectives import Group, rank_in, size_of, sum_over
from ibq_scale.quantize.kinds import KINDS
from ibq_scale.quantize.placement import Layout, Placement
from ibq_scale.quantize.quantized import Quantized
from ibq_scale.quantize.quantizer import find, initial_codebook, lookup, quantize, rows_of
from ibq_scale.quantize.region import initial_ages
from ibq_scale.quantize.usage import CodeUsage, counts_of, perplexity, share_used

# Every loss term of `Quantized`, by its name without the ending. Those that are not here have the weight 1.
_LOSS = "_loss"
_TERMS = tuple(name.removesuffix(_LOSS) for name in Quantized._fields if name.endswith(_LOSS))
_MASKED = -1


@dataclass
class QuantizerOutput:
    """What a quantizer returns. Several ranks share `loss` and the statistics by docs/library.md, "Several ranks"."""

    quantized: Tensor
    """The codes, of z's shape and dtype, with the quantizer's gradient. Zeros at masked tokens."""
    indices: Any
    """int64, z's shape without the dimensions, −1 at masked tokens. A tuple of tensors for several scales."""
    loss: Tensor
    """Scalar, fp32 (fp64 for an fp64 codebook): add it to the model's loss. The sum of `parts`."""
    parts: dict[str, Tensor]
    """The weighted terms of `loss` by name: `quantization`, `entropy`."""
    usage: Tensor
    """Share of the codes that this batch chose, of all ranks that share the codebook: 0 to 1, fp64 scalar."""
    perplexity: Tensor
    """exp of the entropy of the batch's codes, fp64 scalar: 1 to K, 0 without tokens."""
    sample_entropy: Tensor
    """Mean entropy of a token's softmax(S/τ) in nats: low where tokens choose one code each."""
    batch_entropy: Tensor
    """Entropy of the mean softmax(S/τ) in nats, at most log K: high where all codes are chosen alike."""
    levels: tuple[QuantizerOutput, ...] = field(default=())
    """The outputs of the levels of a ResidualQuantizer, or of the groups of a ProductQuantizer."""


# DDP, FSDP and checkpointing look for tensors in outputs.
_pytree.register_dataclass(QuantizerOutput)


class Quantizer(nn.Module):
    """Common to all kinds. Input (…, dim) of any float dtype, or (B, dim, …) with `channel_first`.

    `codebook` holds this rank's rows (K/W, D), fp32: all of them without a `codebook_group`. Construction, every call
    and `backward` are collective over the ranks of the groups. Other keywords are those of `QuantizerConfig`.

    `replica_group`: ranks with the same rows and other tokens, where it cannot be derived from `codebook_group`. Given
    alone, each of its ranks holds the whole codebook, and the batch entropy, usage and gradients are over all.
    `init_scale`: factor on the initial codes. `seed`: of the initial codes. None draws it from torch's generator.
    UserError for settings that do not fit.
    """

    kind: ClassVar[Literal["ibq", "vq", "simvq", "lfq", "fsq"]]

    def __init__(
        self,
        dim: int,
        codes: int,
        *,
        channel_first: bool = False,
        codebook_group: Any = None,
        replica_group: Any = None,
        entropy_weight: float = 0.05,
        quantization_weight: float = 1.0,
        init_scale: float = 1.0,
        seed: int | None = None,
        device: torch.device | str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.settings = _checked(type(self).__name__, self.kind, dim, codes, settings)
        self.channel_first = channel_first
        self.weights = {"quantization": quantization_weight, "entropy": entropy_weight}
        self.placement = Placement(codebook_group, replica_group)
        self.init_scale = init_scale
        self.seed = seed
        learns = KINDS[self.kind].learns
        place = torch.get_default_device() if device is None else torch.device(device)
        # Whether this rank holds some of the rows only.
        self.is_sharded = learns != "nothing" and self.placement.group is not None
        self._start, stop = rows_of(rank_in(self._group), size_of(self._group), codes)
        rows = torch.empty(stop - self._start, self.settings.dim, device=place)
        if learns == "rows":
            self.codebook: Tensor = nn.Parameter(rows)
        else:
            # A grid is made from the settings, and a frozen basis is a part of the model.
            self.register_buffer("codebook", rows, persistent=learns == "layer")
        self.layer = nn.Linear(self.settings.dim, self.settings.dim, device=place) if learns == "layer" else None
        # The window of `region`. It is short, so it starts empty after loading.
        ages = initial_ages(self.settings, len(rows) if self.settings.region else 0, place)
        self.age: Tensor
        self.register_buffer("age", ages, persistent=False)
        self.running = CodeUsage(codes)
        self._seen_by_wrapper = False
        if not rows.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the initial codes: the same for any number of ranks. Collective."""
        seed = int(torch.randint(2**31, (), device="cpu")) if self.seed is None else self.seed
        if self.seed is None and not self.placement.alone:
            seed = self.placement.same_for_all(seed)
        self.age.fill_(self.settings.region_window)
        with torch.device("cpu"):
            rows = initial_codebook(self.settings, seed, self._start, self._start + len(self.codebook))
            self.codebook.copy_(rows if KINDS[self.kind].learns == "nothing" else rows * self.init_scale)
            if self.layer is not None:
                generator = torch.Generator().manual_seed(seed)
                for parameter in self.layer.parameters():
                    values = torch.empty(parameter.shape)
                    parameter.copy_(nn.init.uniform_(values, -1, 1, generator=generator) * self.dim**-0.5)

    @property
    def dim(self) -> int:
        return self.settings.dim

    @property
    def codes(self) -> int:
        """K, over all ranks."""
        return self.settings.codebook_size

    @property
    def is_straight_through(self) -> bool:
        """Whether the gradient of `quantized` is z's own, unchanged."""
        return self.kind != "ibq" and self.settings.straight_through is True

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes z. `mask`: bool, z's shape without the dimensions, True for real tokens.

        Masked tokens are in no loss, entropy or statistic. ValueError for a wrong shape or dtype, and on CPUs for NaN
        or infinity.
        """
        self._refuse_wrappers()
        z_XD = self._last(z)
        z_ND, keep_N = self._tokens(z_XD, mask)
        with torch.autocast(z.device.type, enabled=False):
            layout = self.placement.layout(len(z_ND), z.device)
            out = self._quantize(z_ND, layout)
        indices = self._spread(out.indices_N, keep_N, _MASKED).view(z_XD.shape[:-1])
        quantized = self._spread(out.z_q_ND, keep_N, 0).view(z_XD.shape)
        parts = {name: self._part(name, out, layout) for name in _TERMS}
        counts_K = self.placement.total(counts_of(out.indices_N, self.codes))
        self._count(counts_K)
        return QuantizerOutput(
            quantized=quantized.movedim(-1, 1) if self.channel_first else quantized,
            indices=indices,
            loss=torch.stack([*parts.values()]).sum(),
            parts=parts,
            usage=share_used(counts_K),
            perplexity=perplexity(counts_K),
            sample_entropy=out.sample_entropy,
            batch_entropy=out.batch_entropy,
        )

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The codes alone, int64 as `QuantizerOutput.indices`: exact, the same on any device and in any batch."""
        z_XD = self._last(z)
        z_ND, keep_N = self._tokens(z_XD, mask)
        sizes = self.placement.layout(len(z_ND), z.device).shards.sizes
        with torch.autocast(z.device.type, enabled=False):
            rows_KD = self.rows()
            found_N = find(z_ND.to(rows_KD.dtype), rows_KD, self.settings, self._group, sizes).index_N
        return self._spread(found_N, keep_N, _MASKED).view(z_XD.shape[:-1])

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """The codes of indices of any shape: (…, dim), or (B, dim, …) with `channel_first`. −1 gives zeros."""
        if indices.dtype not in (torch.int64, torch.int32):
            raise UserError(f"{self._name} decodes int64 indices, got {indices.dtype}")
        flat = indices.reshape(-1).long()
        if len(flat) and not -1 <= int(flat.min()) <= int(flat.max()) < self.codes:
            raise UserError(
                f"{self._name} has the codes 0 to {self.codes - 1}, and −1 for masked tokens: got indices from "
                f"{int(flat.min())} to {int(flat.max())}"
            )
        with torch.autocast(flat.device.type, enabled=False):
            sizes = self.placement.layout(len(flat), flat.device).shards.sizes if self.is_sharded else None
            codes_ND = lookup(flat.clamp(min=0), self.rows(), self._group, sizes, self.settings)
        codes = codes_ND.masked_fill((flat < 0)[:, None], 0).view(*indices.shape, self.dim)
        return codes.movedim(-1, 1) if self.channel_first else codes

    def rows(self) -> Tensor:
        """This rank's codes (K/W, D), with gradient to what is learned. SimVQ's are made of its basis and layer."""
        rows_KD = self.codebook
        if rows_KD.dtype in (torch.float16, torch.bfloat16):
            rows_KD = rows_KD.float()
        if self.layer is None:
            return self.placement.averaged(rows_KD, sharded=self.is_sharded)
        weight, bias = (
            self.placement.averaged(parameter.to(rows_KD.dtype), sharded=False)
            for parameter in (self.layer.weight, self.layer.bias)
        )
        return F.linear(rows_KD, weight, bias)

    def grad_square(self) -> Tensor:
        """The squared norm, fp64, of the gradients of what is learned, over the codebook group. Collective."""
        square = torch.zeros((), dtype=torch.float64, device=self.codebook.device)
        if self.is_sharded and self.codebook.grad is not None:
            square = square + self.codebook.grad.double().square().sum()
        (square,) = sum_over([square], self.placement.group)
        for parameter in () if self.layer is None else self.layer.parameters():
            if parameter.grad is not None:
                square = square + parameter.grad.double().square().sum()
        return square

    def _quantize(self, z_ND: Tensor, layout: Layout) -> Quantized:
        rows_KD = self.rows()
        if layout.tokens:
            return quantize(z_ND, rows_KD, self.settings, layout.shards, age_K=self.age if self.training else None)
        # Still connected: every rank's backward pass then has the same collectives.
        nothing = z_ND.sum(dtype=rows_KD.dtype) + rows_KD.sum() * 0
        none = dict.fromkeys(Quantized._fields, nothing)
        return Quantized(**none | {"z_q_ND": z_ND, "indices_N": z_ND.new_zeros(0, dtype=torch.int64)})

    def _part(self, name: str, out: Quantized, layout: Layout) -> Tensor:
        value: Tensor = getattr(out, name + _LOSS)
        if not layout.factor:
            # The mean over no tokens of a rank among others that have some.
            value = value.nan_to_num(0.0)
        factor = self.weights.get(name, 1.0) * layout.factor
        return value if factor == 1.0 else value * factor

    def _count(self, counts_K: Tensor) -> None:
        """Adds to the running usage, in training. Not in the backward pass, where checkpointing calls it again."""
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if self.training and not again:
            self.running.add(counts_K)

    def _last(self, z: Tensor) -> Tensor:
        """(…, dim). UserError where the tokens are not of this width."""
        axis = 1 if self.channel_first else -1
        if not z.is_floating_point():
            raise UserError(f"{self._name} takes tokens of a float dtype, got {z.dtype}")
        if z.dim() <= max(axis, 0) or z.shape[axis] != self.dim:
            where = "(B, dim, …) with channel_first=True" if self.channel_first else "(…, dim)"
            other = -1 if self.channel_first else 1
            hint = ""
            if z.dim() > 1 and z.shape[other] == self.dim:
                hint = f": its axis {other} fits channel_first={not self.channel_first}"
            raise UserError(f"{self._name} of dim={self.dim} takes {where}, got {tuple(z.shape)}{hint}")
        return z.movedim(1, -1) if self.channel_first else z

    def _tokens(self, z_XD: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Real tokens (N, D), and the mask flat."""
        flat = z_XD.reshape(-1, self.dim)
        if mask is None:
            return flat, None
        if mask.dtype != torch.bool or mask.shape != z_XD.shape[:-1]:
            raise UserError(
                f"a mask is bool of shape {tuple(z_XD.shape[:-1])}, True for real tokens: got {mask.dtype} of "
                f"shape {tuple(mask.shape)}"
            )
        keep_N = mask.reshape(-1)
        return flat[keep_N], keep_N

    def _spread(self, x_NX: Tensor, keep_N: Tensor | None, fill: int) -> Tensor:
        """Values of real tokens at their places among all."""
        if keep_N is None:
            return x_NX
        out = x_NX.new_full((len(keep_N), *x_NX.shape[1:]), fill)
        return out.index_put((keep_N,), x_NX)

    def _refuse_wrappers(self) -> None:
        """DDP broadcasts what it is not told to leave alone, and has destroyed the rows of a shard."""
        if self._seen_by_wrapper or not self.is_sharded or torch.compiler.is_compiling():
            return
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is not None:
            named = {name for name, x in _tensors(ddp.module) if x is self.codebook}
            if not named <= ddp.parameters_to_ignore:
                raise UserError("DDP has overwritten a shard of a codebook: wrap DDP(keep_shards_from_ddp(model))")
        self._seen_by_wrapper = True

    def __setattr__(self, name: str, value: Any) -> None:
        """FSDP2 sets its own pieces of a parameter."""
        if name == "codebook" and hasattr(value, "full_tensor") and self.is_sharded:
            raise UserError(
                "FSDP would cut a shard of a codebook: fully_shard(…, ignored_params=own_parameters(model))"
            )
        super().__setattr__(name, value)

    @property
    def _group(self) -> Group:
        return self.placement.group if self.is_sharded else None

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *rest: Any) -> None:
        """A whole codebook is loaded into a shard by its rows. UserError for other sizes."""
        key = f"{prefix}codebook"
        given = state_dict.get(key)
        persistent = key in self.state_dict(prefix=prefix, keep_vars=True)
        if given is None and strict and persistent:
            raise UserError(f"the state has no '{key}': it is not of a {self._name}, or its names have another prefix")
        if given is not None and persistent:
            if given.shape == (self.codes, self.dim):
                mine = given[self._start : self._start + len(self.codebook)]
                state_dict = {**state_dict, key: mine}
            elif given.shape != self.codebook.shape:
                raise UserError(_misfit(key, given, self))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *rest)

    def extra_repr(self) -> str:
        ranks = f", rows {self._start}…{self._start + len(self.codebook) - 1}" if self.is_sharded else ""
        return f"dim={self.dim}, codes={self.codes}{ranks}" + (", channel_first=True" if self.channel_first else "")


def _misfit(key: str, given: Tensor, quantizer: Quantizer) -> str:
    said = (
        f"the state's '{key}' is {tuple(given.shape)}, and the quantizer has {quantizer.codes} codes of {quantizer.dim}"
    )
    if given.dim() == 2 and given.shape[1] == quantizer.dim and quantizer.codes % max(len(given), 1) == 0:
        return f"{said}: it may be one rank's shard, save whole_state_dict(model) instead"
    return said


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _checked(name: str, kind: str, dim: int, codes: int, settings: dict[str, Any]) -> QuantizerConfig:
    """The settings, or UserError in one line, with the nearest name for an unknown one."""
    known = sorted(set(QuantizerConfig.model_fields) - {"kind", "codebook_size"})
    for key in settings:
        if key not in known:
            near = "codes" if key == "codebook_size" else next(iter(difflib.get_close_matches(key, known, n=1)), None)
            raise UserError(f"{name} has no setting '{key}'" + (f", did you mean '{near}'?" if near else ""))
    try:
        return QuantizerConfig(kind=kind, dim=dim, codebook_size=codes, **settings)
    except ValidationError as e:
        from ibq_scale.config.layers import explain

        raise UserError(explain(e.errors()[0], QuantizerConfig, name).replace("codebook_size", "codes")) from None


class IBQ(Quantizer):
    """Index backpropagation quantization (arXiv 2412.02692): every code gets a gradient. Initial codes are N(0, 1)."""

    kind = "ibq"


class VQ(Quantizer):
    """The nearest code, straight through (VQGAN). Initial codes are U(−1/K, 1/K)."""

    kind = "vq"


class SimVQ(Quantizer):
    """The nearest of a frozen basis times one learned linear layer (arXiv 2411.02038). `codebook` is the basis."""

    kind = "simvq"


class LFQ(Quantizer):
    """Sign bits (arXiv 2310.05737): `dim` bits make 2^dim codes, and one of the two may be left out."""

    kind = "lfq"

    def __init__(self, dim: int | None = None, codes: int | None = None, **settings: Any) -> None:
        if dim is None and codes is None:
            raise UserError("LFQ needs dim, its number of bits, or codes = 2^dim")
        dim = dim if dim is not None else max(1, cast(int, codes).bit_length() - 1)
        super().__init__(dim, 2 ** min(dim, 31) if codes is None else codes, **settings)


class FSQ(Quantizer):
    """Rounded numbers (arXiv 2309.15505). `levels`: of each dimension. Their product is the number of codes.

    Without `levels` they are the most equal ones whose product is `codes`: 1000 codes of 4 dimensions are 8, 5, 5, 5.
    """

    kind = "fsq"

    def __init__(
        self, dim: int | None = None, codes: int | None = None, *, levels: Sequence[int] = (), **settings: Any
    ) -> None:
        levels = tuple(levels) or _equal_levels(dim, codes)
        dim = len(levels) if dim is None else dim
        super().__init__(dim, math.prod(levels) if codes is None else codes, levels=levels, **settings)


def _equal_levels(dim: int | None, codes: int | None) -> tuple[int, ...]:
    """Factors of `codes`, as equal as the greedy search finds them, the largest first."""
    if dim is None or codes is None:
        raise UserError("FSQ needs levels, for example levels=[8, 5, 5, 5], or both dim and codes")
    found = _factors(codes, dim)
    if found is None:
        raise UserError(f"FSQ finds no {dim} levels of at least 2 whose product is codes={codes}: give levels")
    return tuple(sorted(found, reverse=True))


def _factors(product: int, count: int) -> list[int] | None:
    if count == 1:
        return [product] if product >= 2 else None
    root = round(product ** (1 / count))
    for factor in sorted(
        (f for f in range(2, min(product, 2**16) + 1) if product % f == 0), key=lambda f: abs(f - root)
    ):
        rest = _factors(product // factor, count - 1)
        if rest is not None:
            return [factor, *rest]
    return None
