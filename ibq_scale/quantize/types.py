"""What every quantizer returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Quantized(NamedTuple):
    """Codes of N tokens of width D, and the loss terms that come with them.

    A named tuple, so that hooks which look into a module's outputs (DeepSpeed's) find the tensors.
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
