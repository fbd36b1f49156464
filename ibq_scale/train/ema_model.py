"""Whole models of a run's averaged weights, on every rank, during an evaluation.

They are separate from the engines. Swapping weights in an engine differs by ZeRO stage, and an evaluation must not
touch the state of the training. The copy fits in the memory of the activations, freed between steps.
"""

from __future__ import annotations

import torch

from ibq_scale.config.run import ARRun, TokenizerRun
from ibq_scale.distributed.world import World
from ibq_scale.models.layout import compute_dtype
from ibq_scale.models.transformer import Transformer
from ibq_scale.pretrained.models import Tokenizer
from ibq_scale.train.codebook import ShardedCodebook
from ibq_scale.zero.sharded_ema import ShardedEMA


def ema_tokenizer(run: TokenizerRun, ema: ShardedEMA, codebook: ShardedCodebook, world: World) -> Tokenizer:
    """The tokenizer of a checkpoint at this step, as `load_tokenizer` reads it, in fp32. Collective."""
    with torch.device("meta"):
        tokenizer = Tokenizer(run.model, run.quantizer)
    tokenizer.to_empty(device=world.device)
    ema.fill(tokenizer)
    tokenizer.codebook_KD.copy_(codebook.averages())
    return tokenizer


def ema_transformer(run: ARRun, ema: ShardedEMA, world: World, order_share: float = 0.0) -> Transformer:
    """The transformer of a checkpoint at this step, as `load_ar` reads it, in the run's precision. Collective.

    `order_share`: probability of a random order, the scale of the order embedding.
    """
    with torch.device("meta"):
        transformer = Transformer(run.model.with_order(order_share)).eval().requires_grad_(False)
    transformer.to(compute_dtype(run))
    transformer.to_empty(device=world.device)
    ema.fill(transformer)
    if transformer.order_emb is not None:
        transformer.order_emb.weight.mul_(order_share)
    return transformer
