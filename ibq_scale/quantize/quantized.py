"""Common to all quantizers: their output, their loss terms, and the error for non-finite input."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ibq_scale.config.models import QuantizerConfig

ENTROPY_EPS = 1e-5
"""ε inside the batch entropy's logarithm, as published."""


class Quantized(NamedTuple):
    """Codes of N tokens of width D, and the loss terms.

    A named tuple: DeepSpeed's hooks on a module's outputs find the tensors in it.
    """

    z_q_ND: Tensor
    """The codes, in z's dtype, with the quantizer's own gradient."""
    indices_N: Tensor
    """int64 rows of the codebook."""
    quantization_loss: Tensor
    """fp32 scalar: the double quantization loss, mean over this rank's N·D."""
    entropy_loss: Tensor
    """fp32 scalar: w_s·sample_entropy − w_b·batch_entropy; 0 where the kind has none."""
    sample_entropy: Tensor
    """fp32 scalar in nats, without gradient: mean entropy of a token's softmax(S/τ)."""
    batch_entropy: Tensor
    """fp32 scalar in nats, without gradient: entropy of the mean softmax(S/τ)."""


def not_finite(z_ND: Tensor, rows_KD: Tensor) -> ValueError:
    """The error for NaN or infinity in a result of z and rows. It names the tensor at fault."""
    guilty = "z·codebook (overflow)"
    if not bool(z_ND.isfinite().all()):
        guilty = "z"
    elif not bool(rows_KD.isfinite().all()):
        guilty = "the codebook"
    return ValueError(f"quantizer input is not finite: {guilty} holds NaN or infinity")


def commitment_terms(hard_ND: Tensor, z_ND: Tensor, settings: QuantizerConfig) -> Tensor:
    """mean‖sg(C[i*]) − z‖² + mean‖C[i*] − sg(z)‖², β on one of them.

    `hard_ND` is C[i*], (N, D), with its gradient to the codebook. β stands on the codebook's term in the published
    models and on the commitment in the paper's text (`settings.beta_on`). With
    `settings.region` the codebook's term is Region VQ's, added by `quantize`.
    """
    on_commitment = settings.beta if settings.beta_on == "commitment" else 1.0
    commitment = on_commitment * (hard_ND.detach() - z_ND).square().mean()
    if settings.region:
        return commitment
    return commitment + codebook_weight(settings) * (hard_ND - z_ND.detach()).square().mean()


def codebook_weight(settings: QuantizerConfig) -> float:
    return settings.beta if settings.beta_on == "codebook" else 1.0


def quantization_loss(z_q_ND: Tensor, hard_ND: Tensor, z_ND: Tensor, settings: QuantizerConfig) -> Tensor:
    """IBQ's double quantization loss, or without its first term, mean‖z_q − z‖², plain VQ's."""
    loss = commitment_terms(hard_ND, z_ND, settings)
    if settings.double_quantization:
        loss = loss + (z_q_ND - z_ND).square().mean()
    return loss


def batch_entropy_of(mean_K: Tensor) -> Tensor:
    """−Σ q̄ log(q̄ + ε) over the rows given (a shard's part of the sum when they are a shard's)."""
    return -(mean_K * (mean_K + ENTROPY_EPS).log()).sum(dim=-1)


def batch_entropy_slope(mean_K: Tensor) -> Tensor:
    """∂(−H_b)/∂q̄ = log(q̄ + ε) + q̄/(q̄ + ε)."""
    shifted_K = mean_K + ENTROPY_EPS
    return shifted_K.log() + mean_K / shifted_K
