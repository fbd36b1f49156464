"""Whole models of a run's averaged weights, on every rank, for as long as somebody evaluates them.

Beside the engines and not by swapping weights in them: an engine's hold differs by ZeRO stage, and what no evaluation
touches is what training goes on with. The room is that of the activations, which are not there in between.
"""

from __future__ import annotations

import torch

from ibq_scale.config.run import ARRun, TokenizerRun
from ibq_scale.distributed.world import World
from ibq_scale.models.precision import compute_dtype
from ibq_scale.models.transformer import Transformer
from ibq_scale.pretrained.loading import Tokenizer
from ibq_scale.train.codebook import ShardedCodebook
from ibq_scale.zero.sharded_ema import ShardedEMA


def ema_tokenizer(run: TokenizerRun, ema: ShardedEMA, codebook: ShardedCodebook, world: World) -> Tokenizer:
    """What `load_tokenizer` would read from a checkpoint of now, in fp32. Collective."""
    with torch.device("meta"):
        tokenizer = Tokenizer(run.model, run.quantizer)
    tokenizer.to_empty(device=world.device)
    ema.fill(tokenizer)
    tokenizer.codebook_KD.copy_(codebook.averages())
    return tokenizer


def ema_transformer(run: ARRun, ema: ShardedEMA, world: World) -> Transformer:
    """What `load_ar` would read from a checkpoint of now, in the precision that the run trains in. Collective."""
    with torch.device("meta"):
        transformer = Transformer(run.model).eval().requires_grad_(False)
    transformer.to(compute_dtype(run))
    transformer.to_empty(device=world.device)
    ema.fill(transformer)
    return transformer
