"""The collectives of a training step, as in DeepSpeed 0.19.8 and the sharded quantizer.

DeepSpeed, for ψ parameters in their bytes (Rajbhandari et al., arXiv 1910.02054, section 7, count 2 ψ elements for
ZeRO-1 and 2, 3 ψ for ZeRO-3). The list has the code's actual calls, counted on ranks in
tests/scaling/test_communication.py:

    ZeRO-0      all-reduce of the gradients, once a step, in fp32 (`communication_data_type`)
    ZeRO-1      the same, under bf16 as a reduce-scatter (`zero.gradients`); then an all-gather of the weights
    ZeRO-2      for each micro-batch a reduce to each rank of its part of a bucket (an all-reduce of the whole one where
                `use_multi_rank_bucket_allreduce` is left on); then an all-gather of the weights
    ZeRO-3      for each micro-batch an all-gather of the weights forward, another backward, and a reduce-scatter of the
                gradients, then an all-gather of the small unpartitioned weights
    Muon        under ZeRO-1 and 2, bf16 pieces of matrices between the ranks that share one (`zero.muon`)

The quantizer (`quantize.function`), for each micro-batch, with M tokens of a group of W ranks, D dimensions, in fp32:

    forward     all-gather of z (M·D), all-to-all of each shard's 4 sums and index of every token (M·24 bytes a rank) to
                the token's own rank, all-gather of the combined values (M·24), reduce-scatter of the chosen codes (M·D)
                and of p·C (M·D), all-reduce of q̄ over replicas (K/W)
    backward    all-gather of two gradients at z_q (M·D each) and of one number per token, all-reduce of another number,
                reduce-scatter of ∂L/∂z (M·D)
    step        all-reduce of the codebook's gradient over replicas (K/W · D), once
    region      all-gather of z and of at most half as many targets (1.5 M·D), all-reduce of the tokens' sums over
                replicas (K/W · D), for any kind of codebook

With W = 1 the codebook is replicated on all ranks, and only the two all-reduces over replicas are left. Sharded traffic
grows with the tokens of the whole group, replicated traffic with the codebook.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from ibq_scale.config.batch import codebook_group_size
from ibq_scale.config.run import TokenizerRun
from ibq_scale.quantize.kinds import KINDS
from ibq_scale.scaling.budget import discriminator_zero
from ibq_scale.scaling.networks import Network
from ibq_scale.zero.memory import FP32, Shares, Zero

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "reduce", "all-to-all", "send"]
BF16 = 2
# Bytes per token and shard: maximum, two sums, a weighted sum, and an index.
OF_A_SHARD = 4 * FP32 + 8
# Tensors (M, D) that are gathered, and that are reduce-scattered to their tokens' ranks.
GATHERED, SCATTERED = 3, 3


@dataclass(frozen=True)
class Transfer:
    """A collective of a step: `size` bytes of the whole tensor, `times` a step, in `messages` parts each, over `ranks`.

    `spread`: the ranks are one of each group of neighbours (replicas), and not neighbours.
    """

    name: str
    kind: Kind
    size: float
    times: int
    ranks: int
    spread: bool = False
    messages: int = 1

    @property
    def sent(self) -> float:
        """Bytes sent by each rank per step in a ring: (n − 1)/n of the tensor, twice that for an all-reduce.

        For an all-to-all the tensor is that of one rank, since its messages go directly to their ranks (Patarasuk and
        Yuan, J. Parallel Distrib. Comput. 69, 2009). A send has all messages of the rank with the most.
        """
        if self.kind == "send":
            return self.size * self.times
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * (self.ranks - 1) / self.ranks * self.size * self.times


def engine_transfers(network: Network, zero: Zero, name: str = "") -> list[Transfer]:
    """Collectives of a DeepSpeed engine around a network."""
    if zero.world == 1:
        return []
    n = Shares.of(network.groups, zero)
    b, world, micro_batches = zero.weight_bytes, zero.world, zero.accumulation
    gradients, weights = f"{name}gradients", f"{name}weights"
    buckets = -(-n.whole // zero.reduce_bucket)
    if zero.stage == 3:
        moved = n.whole - n.persistent
        tensors = sum(size > zero.persistence_threshold for group in network.groups for size in group)
        return [
            Transfer(f"{weights}, forward", "all-gather", b * moved, micro_batches, world, messages=tensors),
            Transfer(f"{weights}, backward", "all-gather", b * moved, micro_batches, world, messages=tensors),
            Transfer(gradients, "reduce-scatter", FP32 * n.whole, micro_batches, world, messages=buckets),
            *([Transfer(f"{weights}, small ones", "all-gather", b * n.persistent, 1, world)] * (n.persistent > 0)),
        ]
    times = micro_batches if zero.stage == 2 else 1
    messages = {"all-reduce": buckets, "reduce": buckets + world, "reduce-scatter": len(network.groups)}
    reduced = Transfer(gradients, zero.reduction, FP32 * n.whole, times, world, messages=messages[zero.reduction])
    if zero.stage == 0:
        return [reduced]
    cut = muon_transfers(network.groups[0], zero) if network.muon else []
    return [reduced, *cut, Transfer(weights, "all-gather", b * n.whole, 1, world)]


def muon_transfers(matrices: Sequence[int], zero: Zero) -> list[Transfer]:
    """The pieces of cut matrices in Muon's step. `matrices`: elements of each, in the order of the flat vector."""
    share = Shares.of([matrices], zero).share
    sent: Counter[int] = Counter()
    most_holders = 1
    for size, end in zip(matrices, accumulate(matrices), strict=True):
        start = end - size
        holders = range(start // share, (end - 1) // share + 1)
        most_holders = max(most_holders, len(holders))
        for rank in holders:
            piece = min(end, (rank + 1) * share) - max(start, rank * share)
            sent[rank] += BF16 * piece * (len(holders) - 1)
    most = max(sent.values())
    # The slowest pair of neighbours has a network between them.
    return [Transfer("Muon's cut matrices", "send", most, 1, most_holders, spread=True)] if most else []


def codebook_transfers(codes: int, dim: int, tokens: int, micro_batches: int, group: int, world: int) -> list[Transfer]:
    """Collectives of an IBQ codebook of K = `codes` rows over groups of `group` ranks, for `tokens` per micro-batch."""
    rows, all_tokens = codes // group, tokens * group
    found = []
    if group > 1:
        wide = FP32 * all_tokens * dim
        sums = OF_A_SHARD * all_tokens
        gathered = GATHERED * wide + sums + FP32 * all_tokens
        found = [
            Transfer("tokens and their gradients", "all-gather", gathered, micro_batches, group),
            Transfer("a shard's sums of all tokens", "all-to-all", sums, micro_batches, group),
            Transfer("codes, p·C and gradients", "reduce-scatter", SCATTERED * wide, micro_batches, group),
            Transfer("a number a token", "all-reduce", FP32 * all_tokens, micro_batches, group),
        ]
    if group < world:
        replicas = world // group
        found += [
            Transfer("q̄ over replicas", "all-reduce", FP32 * rows, micro_batches, replicas, spread=True),
            Transfer("codebook's gradient", "all-reduce", FP32 * rows * dim, 1, replicas, spread=True),
        ]
    return found


def tokenizer_transfers(run: TokenizerRun, zero: Zero, network: Network, discriminator: Network) -> list[Transfer]:
    """Collectives of the tokenizer's step. Only IBQ's codebook is counted, since other kinds send little."""
    found = engine_transfers(network, zero)
    if run.loss.adversarial_weight > 0:
        found += engine_transfers(discriminator, discriminator_zero(zero), "discriminator's ")
    if KINDS[run.quantizer.kind].reaches_all_codes:
        group = codebook_group_size(run, zero.world)
        tokens = run.train.micro_batch * run.model.tokens
        size, dim = run.quantizer.codebook_size, run.quantizer.dim
        found += codebook_transfers(size, dim, tokens, zero.accumulation, group, zero.world)
    return found + (_region_transfers(run, zero) if run.quantizer.region else [])


def _region_transfers(run: TokenizerRun, zero: Zero) -> list[Transfer]:
    group, dim = codebook_group_size(run, zero.world), run.quantizer.dim
    wide = FP32 * run.train.micro_batch * run.model.tokens * group * dim
    rows = FP32 * run.quantizer.codebook_size // group * dim
    replicas = zero.world // group
    found = [
        Transfer("region: tokens and targets", "all-gather", wide + wide // 2, zero.accumulation, group),
        Transfer("region: sums over replicas", "all-reduce", rows, zero.accumulation, replicas, spread=True),
    ]
    return [transfer for transfer, ranks in zip(found, (group, replicas), strict=True) if ranks > 1]
