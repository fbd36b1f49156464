"""A class-conditional transformer over image codes for Hugging Face transformers. Plain torch, without ibq_scale.

Input ids are one class, `codebook_size` + class (`codebook_size` + `classes`: no class), then codes 0 … `codebook_size`
- 1 in raster order. ``logits[:, t]`` (B, T, codebook_size) is the distribution of code t. No class of transformers
computes the same, since positions are rows and columns, and the class token has a zero query and key.
"""

# mypy: disable-error-code="no-any-return,misc"
from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

SIZES: dict[str, Any] = {"codebook_size": 16384, "classes": 1000, "tokens": 256, "depth": 16, "heads": 16}
SIZES |= {"kv_heads": 16, "width": 1024, "ffn_hidden": 2816, "conditioning": "prefix", "qk_norm": False}
RMSNorm = partial(nn.RMSNorm, eps=1e-5)
# Its name before transformers 5.24 was past_key_values.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class IBQConfig(PretrainedConfig):
    """`SIZES`, with their names in ibq_scale and in transformers."""

    model_type = "ibq_ar"
    attribute_map = {  # noqa: RUF012  (transformers reads it from the class)
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
    }

    def __init__(self, **values: Any) -> None:
        for name, default in SIZES.items():
            setattr(self, name, values.pop(name, default))
        self.vocab_size = self.codebook_size
        super().__init__(**{"tie_word_embeddings": False} | values)


def rotary_table(config: IBQConfig) -> Tensor:
    """cos and sin (2, tokens + 1, head_dim / 2): half of the pairs turns with the row, half with the column.

    Those of the class are zero.
    """
    half, side = config.width // config.heads // 4, int(config.tokens**0.5)
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float32, device="cpu") / half)
    angle = torch.arange(side, dtype=torch.float32, device="cpu")[:, None] * frequency
    pairs = [angle[:, None, :].expand(-1, side, -1), angle[None, :, :].expand(side, -1, -1)]
    grid = torch.cat(pairs, dim=-1).flatten(0, 1)
    return F.pad(torch.stack([grid.cos(), grid.sin()]), (0, 0, 1, 0))


def rotate(x_BTHd: Tensor, table_2Tp: Tensor) -> Tensor:
    """Rotates pairs (x0, x1), (x2, x3), … in fp32."""
    cos, sin = table_2Tp[:, :, None]
    even, odd = x_BTHd.float().view(*x_BTHd.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x_BTHd.dtype)


class Attention(nn.Module):
    def __init__(self, config: IBQConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.rows = layer, [config.heads, config.kv_heads, config.kv_heads]
        self.head_dim = config.width // config.heads
        self.wqkv = nn.Linear(config.width, sum(self.rows) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x_BTE: Tensor, table_2Tp: Tensor, cache: Any, past: int) -> Tensor:
        b, t, width = x_BTE.shape
        q, k, v = self.wqkv(x_BTE).view(b, t, sum(self.rows), self.head_dim).split(self.rows, dim=2)
        q, k = rotate(self.q_norm(q), table_2Tp), rotate(self.k_norm(k), table_2Tp)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        mask = None
        if k.shape[2] != t and (t > 1 or k.shape[2] != past + 1):
            keys, queries = (torch.arange(n, device=q.device) for n in (k.shape[2], t))
            mask = keys <= queries[:, None] + past
        grouped, causal = self.rows[0] != self.rows[1], k.shape[2] == t > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return self.wo(out.transpose(1, 2).reshape(b, t, width))


class FeedForward(nn.Module):
    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.ffn_hidden, bias=False)
        self.w3 = nn.Linear(config.width, config.ffn_hidden, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: IBQConfig, layer: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(config, layer), FeedForward(config)
        self.attention_norm, self.ffn_norm = RMSNorm(config.width), RMSNorm(config.width)
        if config.conditioning == "adaln":
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x_BTE: Tensor, class_BE: Tensor, table_2Tp: Tensor, cache: Any, past: int) -> Tensor:
        if not hasattr(self, "ada_lin"):
            x_BTE = x_BTE + self.attention(self.attention_norm(x_BTE), table_2Tp, cache, past)
            return x_BTE + self.feed_forward(self.ffn_norm(x_BTE))
        gain1, gain2, scale1, scale2, shift1, shift2 = self.ada_lin(class_BE)[:, None].chunk(6, dim=-1)
        h = self.attention(self.attention_norm(x_BTE) * (1 + scale1) + shift1, table_2Tp, cache, past)
        x_BTE = x_BTE + h * gain1
        return x_BTE + self.feed_forward(self.ffn_norm(x_BTE) * (1 + scale2) + shift2) * gain2


class HeadNorm(nn.Module):
    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        self.rmsnorm = RMSNorm(config.width)
        if config.conditioning == "adaln":
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x_BTE: Tensor, class_BE: Tensor) -> Tensor:
        if not hasattr(self, "ada_lin"):
            return self.rmsnorm(x_BTE)
        scale, shift = self.ada_lin(class_BE)[:, None].chunk(2, dim=-1)
        return self.rmsnorm(x_BTE) * (1 + scale) + shift


class IBQForCausalLM(PreTrainedModel, GenerationMixin):
    """The transformer. Parameters have ibq_scale's names."""

    config_class = IBQConfig
    _no_split_modules = ("Block",)
    _input_embed_layer = "tok_emb"

    def __init__(self, config: IBQConfig) -> None:
        super().__init__(config)
        self.tok_emb = nn.Embedding(config.codebook_size, config.width)
        self.class_emb = nn.ModuleDict({"embedding_table": nn.Embedding(config.classes + 1, config.width)})
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.head_nm = HeadNorm(config)
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """int64 (B, T): class and codes, or the codes behind the cache. `labels`: the same. ValueError for padding."""
        if attention_mask is not None and attention_mask.ndim == 2 and not attention_mask.bool().all():
            raise ValueError("there is no padding: all prompts of a batch have the same length")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        if CACHE != "cache" and getattr(cache, "is_compileable", False):
            raise ValueError("a static cache needs transformers 5.24 or later")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past + input_ids.shape[1] > self.config.tokens + 1:
            raise ValueError(f"an image has one class and {self.config.tokens} codes")
        size = self.config.codebook_size
        class_BTE = self.class_emb["embedding_table"]((input_ids - size).clamp(min=0))
        code_BTE = self.tok_emb(input_ids.clamp(max=size - 1))
        x_BTE = torch.where((input_ids >= size)[..., None], class_BTE, code_BTE)
        class_BE = class_BTE[:, 0] if past == 0 else cache.class_BE
        if cache is not None:
            cache.class_BE = class_BE
        table = rotary_table(self.config)[:, past : past + input_ids.shape[1]].to(x_BTE.device)
        for block in self.blocks:
            x_BTE = block(x_BTE, class_BE, table, cache, past)
        logits = self.head(self.head_nm(x_BTE, class_BE)[:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits, labels, size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
