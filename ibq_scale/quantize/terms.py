"""Loss terms that all quantizers of a codebook share."""

from __future__ import annotations

from torch import Tensor

from ibq_scale.config.models import QuantizerConfig

ENTROPY_EPS = 1e-5
"""ε inside the batch entropy's logarithm, as published."""


def commitment_terms(hard_ND: Tensor, z_ND: Tensor, settings: QuantizerConfig) -> Tensor:
    """mean‖sg(C[i*]) − z‖² + mean‖C[i*] − sg(z)‖², β on one of them.

    `hard_ND` is C[i*], (N, D), with its gradient to the codebook. β stands on the codebook's term in the published
    models and on the commitment in the paper's text (`settings.beta_on`).
    """
    on_codebook = settings.beta if settings.beta_on == "codebook" else 1.0
    on_commitment = settings.beta if settings.beta_on == "commitment" else 1.0
    commitment = (hard_ND.detach() - z_ND).square().mean()
    return on_commitment * commitment + on_codebook * (hard_ND - z_ND.detach()).square().mean()


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
