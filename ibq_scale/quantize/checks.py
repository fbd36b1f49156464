"""What to say of input that no quantizer can take."""

from __future__ import annotations

from torch import Tensor


def not_finite(z_ND: Tensor, rows_KD: Tensor) -> ValueError:
    """The error that names the tensor at fault, for whoever has met NaN or infinity in something made of both."""
    guilty = "z·codebook (overflow)"
    if not bool(z_ND.isfinite().all()):
        guilty = "z"
    elif not bool(rows_KD.isfinite().all()):
        guilty = "the codebook"
    return ValueError(f"quantizer input is not finite: {guilty} holds NaN or infinity")
