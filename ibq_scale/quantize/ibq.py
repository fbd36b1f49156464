"""Index backpropagation quantization, dense: the oracle of the tests, written as the paper's equations read.

Holds several N×K tensors. All backends must equal it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ibq_scale.config.models import QuantizerConfig
from ibq_scale.quantize.quantized import Quantized, batch_entropy_of, quantization_loss


def ibq_dense(z_ND: Tensor, codebook_KD: Tensor, settings: QuantizerConfig) -> Quantized:
    """Quantizes z (N, D) with the codebook (K, D) (arXiv 2412.02692). Any float dtype, also float64.

    The one-hot of the argmax passes its gradient on to softmax(z Cᵀ), so every row of the codebook learns.
    """
    S_NK = z_ND @ codebook_KD.T
    p_NK = S_NK.softmax(dim=1)
    indices_N = S_NK.argmax(dim=1)
    one_hot_NK = F.one_hot(indices_N, codebook_KD.shape[0]).to(p_NK.dtype)
    hard_ND = codebook_KD[indices_N]
    z_q_ND = (one_hot_NK + p_NK - p_NK.detach()) @ codebook_KD if settings.straight_through else hard_ND
    q_log_NK = (S_NK / settings.entropy_temperature).log_softmax(dim=1)
    q_NK = q_log_NK.exp()
    sample_entropy = -(q_NK * q_log_NK).sum(dim=1).mean()
    batch_entropy = batch_entropy_of(q_NK.mean(dim=0))
    return Quantized(
        z_q_ND=z_q_ND,
        indices_N=indices_N,
        quantization_loss=quantization_loss(z_q_ND, hard_ND, z_ND, settings),
        entropy_loss=settings.sample_entropy_weight * sample_entropy - settings.batch_entropy_weight * batch_entropy,
        sample_entropy=sample_entropy.detach(),
        batch_entropy=batch_entropy.detach(),
    )
