"""The IBQ function by cuBLAS products over blocks of tokens, with fused elementwise Triton kernels between them.

5 products of N·K·D: blocks and products are the tiled backend's. Of its some 25 walks over a block of S, 4 are left.
The kernels need almost no shared memory, so this backend runs on chips that hold no tile of a product kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ibq_scale.quantize.backend_interface import BackwardInputs, PartSums, RowStatistics, combine
from ibq_scale.quantize.product import product_into
from ibq_scale.quantize.tiled_backend import BlockScratch, TiledBackend
from ibq_scale.quantize.tiles import Split, Tile, ceil_div, chosen, launch


class CublasBackend(TiledBackend):
    """See `backend_interface.WholeRowBackend`. fp32 tensors on a CUDA device, or in Triton's interpreter."""

    def _block_sums(
        self, tile: BlockScratch, S: Tensor, mean_K: Tensor | None, rows_KD: Tensor, soft_codes_BD: Tensor | None
    ) -> tuple[Tensor, ...]:
        K, B = S.shape
        split = self._split(S)
        index_PB = torch.empty((split.parts, B), dtype=torch.int32, device=S.device)
        top, total, total_tau, weighted = S.new_empty((4, split.parts, B)).unbind()
        self._over_tokens("column_sums", split, S, index_PB, top, total, total_tau, weighted, B, K, B, split.size,
            1.0 / self.temperature)  # fmt: skip
        columns = zip(index_PB.long(), top, total, total_tau, weighted, strict=True)
        sums = combine([PartSums(*column, None) for column in columns], [0] * split.parts, self.temperature)
        if mean_K is not None:
            self._add_means(tile, S, RowStatistics.of(sums), mean_K)
        if soft_codes_BD is not None:
            product_into(soft_codes_BD, S.sub_(sums.top).exp_().T, rows_KD, self.precision)
        return sums.index, sums.top, sums.total, sums.total_tau, sums.weighted

    def _add_means(self, tile: BlockScratch, S: Tensor, rows: RowStatistics, mean_K: Tensor) -> None:
        (K, B), shape = S.shape, self._shape("column_means", S)
        launch("column_means", shape, (ceil_div(K, shape.codes),), 1, self.precision,
            S, rows.top, rows.log_sum_tau, mean_K, B, K, B, 1.0 / self.temperature)  # fmt: skip

    def _pi(self, tile: BlockScratch, S: Tensor, rows: RowStatistics, batch_K: Tensor) -> Tensor:
        return self._dots(S, S, rows, batch_K)[1]

    def _dots(self, S: Tensor, G: Tensor, rows: RowStatistics, batch_K: Tensor) -> tuple[Tensor, Tensor]:
        """δ and π of a block (B,)."""
        K, B = S.shape
        split = self._split(S)
        delta_PB, pi_PB = S.new_empty((2, split.parts, B)).unbind()
        self._over_tokens("column_dots", split, S, G, rows.top, rows.log_sum, rows.log_sum_tau, batch_K, delta_PB,
            pi_PB, B, K, S.stride(0), split.size, 1.0 / self.temperature)  # fmt: skip
        return delta_PB.sum(dim=0), pi_PB.sum(dim=0)

    def _grad_scores(self, tile: BlockScratch, inputs: BackwardInputs, number: int, block: slice) -> Tensor:
        rows, sample = inputs.statistics.rows(block), inputs.entropy.sample_M[block].contiguous()
        S, G = tile.both_products(inputs.codebook.rows_KD, inputs.z_MD[block], inputs.g_MD[block])
        K, B = S.shape
        batch_K = S.new_zeros(K) if inputs.entropy.batch_GK is None else inputs.entropy.batch_GK[number]
        if inputs.delta_M is None:
            delta, pi = self._dots(S, G, rows, batch_K)
        else:
            delta = inputs.delta_M[block]
            pi = torch.zeros_like(delta) if inputs.pi_M is None else inputs.pi_M[block]
        shape = self._shape("column_slopes", S)
        launch("column_slopes", shape, (ceil_div(B, shape.tokens), ceil_div(K, shape.codes)), 1, self.precision,
            S, G, rows.top, rows.log_sum, rows.log_sum_tau, rows.entropy, sample, delta, pi, batch_K, B, K,
            S.stride(0), 1.0 / self.temperature)  # fmt: skip
        return G

    def _over_tokens(self, kernel: str, split: Split, S: Tensor, *arguments: Tensor | float) -> None:
        shape = self._shape(kernel, S)
        grid = (ceil_div(S.shape[1], shape.tokens), split.parts)
        launch(kernel, shape, grid, 1, self.precision, S, *arguments)

    def _split(self, S: Tensor) -> Split:
        """Parts of the codes for a launch over tokens."""
        return Split.of(S.shape[0], ceil_div(S.shape[1], self._shape("column_sums", S).tokens), S.device)

    def _shape(self, kernel: str, S: Tensor) -> Tile:
        return chosen(kernel, self.precision, 1, S.device)
