"""`train.deterministic`: GPU kernels with a fixed order of summation, or an error where torch has none."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
import torch.utils.deterministic

from ibq_scale.config.run import AnyRun


def fix_the_order_of_sums(run: AnyRun) -> None:
    """Sets torch's switches for the rest of the process, if `train.deterministic`. Call it before the first product.

    Covers torch's operators, cuBLAS, cuDNN, flash-attn 2 and 3 (`models.attention` refuses 4) and the compiler's choice
    of kernels. Torch raises RuntimeError at an operator without a deterministic kernel.
    """
    if not run.train.deterministic:
        return
    # Without a fixed workspace cuBLAS may pick another algorithm on each stream.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # A debugging aid of the same switch. It costs a pass over each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if run.model.compile:
        config: Any = importlib.import_module("torch._inductor.config")
        # The compiler otherwise picks kernels by timing. Older releases lack the switch.
        if hasattr(config, "deterministic"):
            config.deterministic = True
