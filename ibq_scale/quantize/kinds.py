"""The kinds of quantizers, each described once: training, plans, exports and model cards read this table.

A new kind is a function in a module of its own, an entry here, and its name in `QuantizerConfig.kind`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.collectives import Group, Shards
from ibq_scale.quantize.fsq import fsq, grid, grid_index
from ibq_scale.quantize.function import Settings, group_name, ibq_function, softmax_sums
from ibq_scale.quantize.lfq import bit_sums, corners, lfq, sign_index
from ibq_scale.quantize.quantized import Quantized, quantization_loss
from ibq_scale.quantize.search import Found, Score, best_rows
from ibq_scale.quantize.vq import vq

# Rows drawn together from one seed: any split of the codebook then starts from the same numbers.
INIT_BLOCK = 1024


@dataclass(frozen=True)
class Kind:
    """A quantizer as the package uses it. Tokens z (N, D) and rows (K/W, D) have one dtype."""

    words: str
    """Its name in a model card."""
    quantize: Callable[[Tensor, Tensor, QuantizerConfig, Shards, Tensor | None], Quantized]
    """(z, rows, settings, shards, mean_K) → codes and losses, with gradient."""
    index: Callable[[Tensor, Tensor, QuantizerConfig, Group, list[int] | None], Found]
    """(z, rows, settings, group, sizes) → the code of each token, exactly."""
    initial_rows: Callable[[QuantizerConfig, int, int, int], Tensor]
    """(settings, seed, start, stop) → rows of a fresh codebook, the same for every split of it."""
    learns: Literal["rows", "layer", "nothing"]
    """The rows themselves, one linear layer on frozen rows (`train.simvq`), or nothing."""
    batch_sums: Callable[[Tensor, Tensor, QuantizerConfig, Shards], tuple[Tensor, Tensor]] | None = None
    """Σ q over all ranks' tokens, and their number, for a batch entropy over several micro-batches; or none."""
    products: int = 0
    """Products of tokens × codes × D that a training step needs."""
    reaches_all_codes: bool = False
    """Whether a token's gradient reaches every code: the codebook's exchange then counts in a plan."""
    published: bool = False
    """Whether the published code has it."""


def _ibq(z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, shards: Shards, mean_K: Tensor | None) -> Quantized:
    out = ibq_function(_scaled(z_ND, settings), rows_KD, _function_settings(settings, shards), mean_K)
    z_q_ND = out.z_q_ND if settings.straight_through else out.hard_ND
    return Quantized(
        z_q_ND=z_q_ND,
        indices_N=out.indices_N,
        quantization_loss=quantization_loss(z_q_ND, out.hard_ND, z_ND, settings),
        entropy_loss=out.entropy_loss,
        sample_entropy=out.sample_entropy,
        batch_entropy=out.batch_entropy,
    )


def _ibq_sums(z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, shards: Shards) -> tuple[Tensor, Tensor]:
    return softmax_sums(_scaled(z_ND, settings), rows_KD, _function_settings(settings, shards))


def _scaled(z_ND: Tensor, settings: QuantizerConfig) -> Tensor:
    """z with S = cos/temperature for unit rows."""
    return z_ND / settings.cosine_temperature if settings.l2_normalize else z_ND


def _function_settings(settings: QuantizerConfig, shards: Shards) -> Settings:
    return Settings(
        sizes=[] if shards.group is None else shards.sizes or [],
        group=group_name(shards.group),
        replicas=group_name(shards.replicas),
        temperature=settings.entropy_temperature,
        sample_weight=settings.sample_entropy_weight,
        batch_weight=settings.batch_entropy_weight,
        global_entropy=settings.entropy_scope == "global",
        precision=settings.logit_precision,
        backend=settings.backend,
        tile_bytes=settings.tile_bytes or 0,
    )


def _searched(score: Score) -> Callable[[Tensor, Tensor, QuantizerConfig, Group, list[int] | None], Found]:
    """The row of the best score, over the whole sharded codebook."""

    def index(z_ND: Tensor, rows_KD: Tensor, settings: QuantizerConfig, group: Group, sizes: list[int] | None) -> Found:
        return best_rows(
            z_ND.to(rows_KD.dtype),
            rows_KD,
            score,
            coarse=settings.search,
            backend=settings.backend,
            tile_bytes=settings.tile_bytes,
            group=group,
            sizes=sizes,
        )

    return index


def _computed(
    of_tokens: Callable[[Tensor, QuantizerConfig], Tensor],
) -> Callable[[Tensor, Tensor, QuantizerConfig, Group, list[int] | None], Found]:
    """The index by the token alone."""

    def index(z_ND: Tensor, _: Tensor, settings: QuantizerConfig, __: Group, ___: list[int] | None) -> Found:
        return Found(of_tokens(z_ND, settings), torch.zeros((), dtype=torch.int64, device=z_ND.device))

    return index


def _drawn(
    draw: Callable[[Tensor, torch.Generator, QuantizerConfig], Tensor],
) -> Callable[[QuantizerConfig, int, int, int], Tensor]:
    """Rows drawn in blocks, each from a seed of its own."""

    def rows(settings: QuantizerConfig, seed: int, start: int, stop: int) -> Tensor:
        first = start // INIT_BLOCK * INIT_BLOCK
        blocks = []
        for block in range(first, stop, INIT_BLOCK):
            generator = torch.Generator().manual_seed(seed * 2_147_483_629 + block)
            blocks.append(draw(torch.empty(INIT_BLOCK, settings.dim), generator, settings))
        return torch.cat(blocks)[start - first : stop - first].clone()

    return rows


def _uniform(values: Tensor, generator: torch.Generator, settings: QuantizerConfig) -> Tensor:
    bound = 1.0 / settings.codebook_size
    return values.uniform_(-bound, bound, generator=generator)


KINDS: dict[str, Kind] = {
    # N(0, 1), as published.
    "ibq": Kind(
        words="index backpropagation quantization (IBQ, arXiv 2412.02692)",
        quantize=_ibq,
        index=_searched(Score.DOT),
        initial_rows=_drawn(lambda rows, rng, _: rows.normal_(generator=rng)),
        learns="rows",
        batch_sums=_ibq_sums,
        products=5,
        reaches_all_codes=True,
        published=True,
    ),
    # U(−1/K, 1/K), as VQGAN.
    "vq": Kind(
        words="vector quantization (VQGAN)",
        quantize=vq,
        index=_searched(Score.DISTANCE),
        initial_rows=_drawn(_uniform),
        learns="rows",
        products=1,
        published=True,
    ),
    # A basis from N(0, 1/D), as published. Its layer makes the codes once a micro-batch: little beside the search.
    "simvq": Kind(
        words="SimVQ (arXiv 2411.02038)",
        quantize=vq,
        index=_searched(Score.DISTANCE),
        initial_rows=_drawn(lambda rows, rng, settings: rows.normal_(std=settings.dim**-0.5, generator=rng)),
        learns="layer",
        products=1,
    ),
    "lfq": Kind(
        words="lookup-free quantization (arXiv 2310.05737)",
        quantize=lfq,
        index=_computed(lambda z_ND, _: sign_index(z_ND)),
        initial_rows=lambda settings, _, start, stop: corners(settings.dim, start, stop),
        learns="nothing",
        batch_sums=bit_sums,
    ),
    "fsq": Kind(
        words="finite scalar quantization (FSQ, arXiv 2309.15505)",
        quantize=lambda z_ND, _, settings, *__: fsq(z_ND, settings),
        index=_computed(lambda z_ND, settings: grid_index(z_ND, settings.levels)),
        initial_rows=lambda settings, _, start, stop: grid(settings.levels, start, stop),
        learns="nothing",
    ),
}
