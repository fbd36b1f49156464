"""The conditional transformer: Llama-like blocks over codes, 2D rotary positions, the class as a prefix token.

The code at t is predicted from the prefix and codes 0 … t − 1. With ``conditioning=adaln`` the class also modulates
every block. Parameter names are then those of the published checkpoints without the leading ``transformer.``. With
``conditioning=embedding`` the prefix is given vectors instead of a class.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ibq_scale.config.models import AttentionKind, TransformerConfig
from ibq_scale.models.attention import attention, choose
from ibq_scale.models.cache import KVCache, LayerCache
from ibq_scale.models.condition import Condition, ConditionEmbedding, Prefix, visible_keys
from ibq_scale.models.head import Head
from ibq_scale.models.initial import Normal, drawn, fill
from ibq_scale.models.order import Orders, permuted_tables
from ibq_scale.models.recompute import keeping_products
from ibq_scale.models.rotary import rotary_table, rotate

STD = 0.02
# torch.compile's limit of graphs per block: training and evaluation, and batches of other sizes.
COMPILED_GRAPHS = 16
# The mean square is in fp32.
RMSNorm = partial(nn.RMSNorm, eps=1e-5)


class AdaLN(nn.Sequential):
    """The class embedding's `vectors` modulations."""

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, vectors * width))


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        # Rows of queries, keys, values.
        self.heads = [config.heads, config.kv_groups, config.kv_groups]
        self.wqkv = nn.Linear(config.width, sum(self.heads) * config.head_dim, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x_BTE: Tensor,
        table_R2Tp: Tensor,
        cache: LayerCache | None,
        kind: AttentionKind,
        visible_BTS: Tensor | None,
    ) -> Tensor:
        b, t, width = x_BTE.shape
        q, k, v = self.wqkv(x_BTE).view(b, t, sum(self.heads), self.config.head_dim).split(self.heads, dim=2)
        q, k = rotate(self.q_norm(q), table_R2Tp[0]), rotate(self.k_norm(k), table_R2Tp[-1])
        if cache is not None:
            k, v = cache.extend(k, v)
        causal = cache is None and visible_BTS is None and t > 1
        mixed = attention(q, k, v, causal=causal, kind=kind, visible_BTS=visible_BTS)
        out: Tensor = self.wo(mixed.reshape(b, t, width))
        return out


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.ffn_hidden, bias=False)
        self.w3 = nn.Linear(config.width, config.ffn_hidden, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden, config.width, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))
        return out


class Block(nn.Module):
    """x + Attn(norm(x)), then the same with SwiGLU. The class enters through the prefix token only.

    With AdaLN x + γ₁·Attn(norm(x)·(1 + s₁) + b₁), then the same with SwiGLU. The six vectors come from the class.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.checkpointing = config.activation_checkpointing
        self.ada_lin = AdaLN(config.width, 6) if config.conditioning == "adaln" else None

    def forward(self, *inputs: Any) -> Tensor:
        """`compute`, recomputed in the backward pass as `activation_checkpointing` says."""
        # Inside the block, so that torch.compile covers the recomputation.
        if self.checkpointing in ("auto", "none") or not (self.training and torch.is_grad_enabled()):
            return self.compute(*inputs)
        how: dict[str, Any] = {} if self.checkpointing == "full" else {"context_fn": keeping_products}
        out: Tensor = checkpoint(self.compute, *inputs, use_reentrant=False, **how)
        return out

    def compute(
        self,
        x_BTE: Tensor,
        condition_BE: Tensor,
        table_R2Tp: Tensor,
        cache: LayerCache | None,
        kind: AttentionKind,
        visible_BTS: Tensor | None = None,
    ) -> Tensor:
        """The block itself. With a cache, `condition_BE` is the result of `modulation`."""
        out: Tensor
        if self.ada_lin is None:
            h = self.attention(self.attention_norm(x_BTE), table_R2Tp, cache, kind, visible_BTS)
            x_BTE = x_BTE + self.dropout(h)
            out = x_BTE + self.feed_forward(self.ffn_norm(x_BTE))
            return out
        vectors = self.modulation(condition_BE) if cache is None else condition_BE
        gain1, gain2, scale1, scale2, shift1, shift2 = vectors[:, None].chunk(6, dim=-1)
        h = self.attention(self.attention_norm(x_BTE) * (1 + scale1) + shift1, table_R2Tp, cache, kind, visible_BTS)
        x_BTE = x_BTE + self.dropout(h) * gain1
        out = x_BTE + self.feed_forward(self.ffn_norm(x_BTE) * (1 + scale2) + shift2) * gain2
        return out

    def modulation(self, condition_BE: Tensor) -> Tensor:
        """The block's part that depends on the class alone, with AdaLN six vectors (B, 6 E). Generation keeps it."""
        out: Tensor = condition_BE if self.ada_lin is None else self.ada_lin(condition_BE)
        return out


class HeadNorm(nn.Module):
    """The norm before the head, with AdaLN also scale and shift."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.rmsnorm = RMSNorm(config.width)
        self.ada_lin = AdaLN(config.width, 2) if config.conditioning == "adaln" else None

    def forward(self, x_BTE: Tensor, condition_BE: Tensor) -> Tensor:
        out: Tensor = self.rmsnorm(x_BTE)
        if self.ada_lin is None:
            return out
        scale, shift = self.ada_lin(condition_BE)[:, None].chunk(2, dim=-1)
        out = out * (1 + scale) + shift
        return out


class ClassEmbedding(nn.Module):
    """classes + 1 rows. The last means "no class" and replaces labels in label dropout."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.no_class = config.classes
        self.dropout = config.label_dropout
        self.embedding_table = nn.Embedding(config.classes + 1, config.width)

    def forward(self, labels_B: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            dropped = torch.rand(labels_B.shape, device=labels_B.device) < self.dropout
            labels_B = torch.where(dropped, self.no_class, labels_B)
        out: Tensor = self.embedding_table(labels_B)
        return out


class Transformer(nn.Module):
    """See the module's docstring. Untied head without bias.

    The initial weights are a function of config and seed. A model on the meta device has none.
    """

    def __init__(self, config: TransformerConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.codebook_size, config.width)
        of_class = config.conditioning != "embedding"
        self.class_emb = ClassEmbedding(config) if of_class else None
        self.condition_emb = None if of_class else ConditionEmbedding(config)
        self.tok_dropout = nn.Dropout(config.token_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(config)
        self.head = Head(config.width, config.codebook_size)
        self.order_emb = None if config.order == "raster" else nn.Embedding(config.tokens, config.width)
        # fp32 always. It is no buffer, so casts of the module do not reach it. It moves to the device of the inputs.
        self._table_2Sp = rotary_table(config)
        values = drawn(self.initial(), seed)
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                fill(parameter.detach().view(-1), values, name)

    def forward(self, codes_BT: Tensor, labels_B: Tensor, condition: Condition | None = None) -> Tensor:
        """Codes int64 (B, T), T ≤ tokens, and labels int64 (B,) → logits (B, T, V).

        ``logits[:, t]`` is the distribution of code t given the label and the codes before t. The last code is never
        read. Label ``classes`` means "no class". A model of ``conditioning=embedding`` reads `condition` instead of
        the label, and None means no condition.
        """
        logits: Tensor = self.head(self.hidden(codes_BT, labels_B, condition))
        return logits

    def losses(
        self, codes_BT: Tensor, labels_B: Tensor, condition: Condition | None = None, orders: Orders | None = None
    ) -> Tensor:
        """Cross-entropy of each code (B, T), fp32, as `forward`, without full logits.

        `orders`: of each sample's steps (models/order.py), else raster. Losses are by step.
        """
        if orders is not None:
            codes_BT = codes_BT.gather(1, orders.places_BT)
        losses: Tensor = self.head(self.hidden(codes_BT, labels_B, condition, orders), codes_BT)
        return losses

    def hidden(
        self, codes_BT: Tensor, labels_B: Tensor, condition: Condition | None = None, orders: Orders | None = None
    ) -> Tensor:
        """The head's input (B, T, E): ``head(hidden(codes, labels))`` are the logits of `forward`.

        `orders`: the raster places of `codes_BT`, for a model with an order embedding.
        """
        start_BE, prefix = self._begin(labels_B, condition)
        x_BTE = self.tok_dropout(torch.cat([start_BE[:, None], self.tok_emb(codes_BT[:, :-1])], dim=1))
        rows = self._table_on(x_BTE.device)
        table, visible = rows[None, :, : x_BTE.shape[1]], None
        if orders is not None:
            assert self.order_emb is not None
            x_BTE = x_BTE + orders.scales_B[:, None, None].to(x_BTE.dtype) * self.order_emb(orders.places_BT)
            table = permuted_tables(rows, orders.places_BT)
        elif self.order_emb is not None:
            x_BTE = x_BTE + self.order_emb(torch.arange(x_BTE.shape[1], device=x_BTE.device))
        if prefix is not None:
            visible = visible_keys(prefix.visible_BL, x_BTE.shape[1])
            x_BTE = torch.cat([prefix.vectors_BLE, x_BTE], dim=1)
            still = rows[:, :1].view(2, *[1] * (table.ndim - 3), -1)
            still = still.expand(*table.shape[:-2], self.config.condition_tokens, -1)
            table = torch.cat([still, table], dim=-2)
        kind = self._kind(x_BTE, visible)
        for block in self.blocks:
            x_BTE = block(x_BTE, start_BE, table, None, kind, visible)
        out: Tensor = self.head_nm(x_BTE[:, self.config.condition_tokens :], start_BE)
        return out

    def begin(self, labels_B: Tensor, cache: KVCache, condition: Condition | None = None) -> Tensor:
        """The first code's logits (B, V). Clears the cache and stores what depends on labels or condition alone."""
        start_BE, prefix = self._begin(labels_B, condition)
        cache.clear()
        modulations = [block.modulation(start_BE) for block in self.blocks if isinstance(block, Block)]
        cache.keep([*modulations, start_BE], None if prefix is None else prefix.visible_BL)
        return self._step(start_BE, cache, prefix)

    def step(self, codes_B: Tensor, cache: KVCache) -> Tensor:
        """The next code's logits (B, V) after the last code, `codes_B`. `begin` comes first."""
        return self._step(self.tok_emb(codes_B), cache)

    def _begin(self, labels_B: Tensor, condition: Condition | None) -> tuple[Tensor, Prefix | None]:
        """The token before code 0 (B, E), and the vectors before it, if any."""
        if self.condition_emb is None:
            assert self.class_emb is not None
            assert condition is None, "a class-conditional model takes labels"
            return self.class_emb(labels_B), None
        if condition is None:
            sizes = (len(labels_B), self.config.condition_tokens, self.config.condition_width)
            condition = Condition(torch.zeros(sizes, device=labels_B.device), torch.zeros_like(labels_B))
        prefix: Prefix = self.condition_emb(condition)
        return prefix.start_BE, prefix

    def _step(self, x_BE: Tensor, cache: KVCache, prefix: Prefix | None = None) -> Tensor:
        if self.order_emb is not None:
            # The row of the step's target.
            x_BE = x_BE + self.order_emb(cache.position_1)
        x_BTE = x_BE[:, None]
        if prefix is not None:
            x_BTE = torch.cat([prefix.vectors_BLE, x_BTE], dim=1)
        slots_T = cache.slots(x_BTE.shape[1])
        rows = self._table_on(x_BTE.device)
        # Slots of the prefix turn as its last token, the table's first row.
        table = rows.index_select(1, (slots_T - self.config.condition_tokens).clamp(min=0))[None]
        visible = cache.visible(x_BTE.shape[1])
        kind = self._kind(x_BTE, visible)
        for i, block in enumerate(self.blocks):
            x_BTE = block(x_BTE, cache.kept[i], table, cache.layer(i, slots_T), kind, visible)
        cache.advance()
        logits: Tensor = self.head(self.head_nm(x_BTE[:, -1:], cache.kept[-1])[:, 0])
        return logits

    def _kind(self, x_BTE: Tensor, visible: Tensor | None) -> AttentionKind:
        how = (self.config.attention, x_BTE.device, x_BTE.dtype, self.config.head_dim)
        return choose(*how, masked=visible is not None)

    def _table_on(self, device: torch.device) -> Tensor:
        if self._table_2Sp.device != device:
            self._table_2Sp = self._table_2Sp.to(device)
        return self._table_2Sp

    def compile_regions(self) -> None:
        """Compiles every block with torch.compile, in place. Parameters keep their names, and blocks share a graph."""
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_GRAPHS)
        for block in self.blocks:
            # Not as a full graph: some flash-attn packages are no operators for the compiler and break the graph.
            block.compile(dynamic=False)

    def initial(self) -> dict[str, Normal]:
        """The initial distribution of each parameter: N(0, 0.02²), norms 1, biases and head 0.

        In AdaLN, rows of γ have `adaln_gain_init` times this deviation, and rows of scales and shifts half of it.
        """
        gains = STD * self.config.adaln_gain_init
        recipe = {}
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                std, mean = (0.0, float(isinstance(module, nn.RMSNorm))) if parameter.ndim == 1 else (STD, 0.0)
                recipe[name] = Normal(parameter.numel(), std, mean)
        for prefix, module in self.named_modules():
            if isinstance(module, AdaLN):
                # γ₁ and γ₂ come first among a block's six.
                size, first = module.get_parameter("1.weight").numel(), 2 * self.config.width**2
                in_block = size == 3 * first
                recipe[f"{prefix}.1.weight"] = Normal(size, STD / 2, 0.0, first if in_block else 0, gains)
        return recipe | {"head.weight": Normal(self.head.weight.numel(), 0.0)}


class TrainedTransformer(Transformer):
    """The same for engines. They call `forward` only, so it computes `losses`."""

    def forward(  # type: ignore[override]
        self,
        codes_BT: Tensor,
        labels_B: Tensor,
        places_BT: Tensor | None = None,
        scales_B: Tensor | None = None,
        vectors_BLC: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """`Transformer.losses`. Engines pass tensors only, so orders and conditions come in two each."""
        orders = None if places_BT is None or scales_B is None else Orders(places_BT, scales_B)
        return self.losses(codes_BT, labels_B, Condition.of(vectors_BLC, lengths_B), orders)
