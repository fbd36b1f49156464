"""`train.deterministic`: kernels that add in a fixed order on GPUs, or an error where torch has none."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
import torch.utils.deterministic

from ibq_scale.config.run import AnyRun


def fix_the_order_of_sums(run: AnyRun) -> None:
    """Where the run asks for it, for the rest of the process; before anything is multiplied on a GPU.

    Covers torch's operators, cuBLAS, cuDNN, flash-attn 2 and 3 (`models.attention` refuses 4) and the compiler's choice
    of kernels. Torch raises RuntimeError at an operator that has no such kernel.
    """
    if not run.train.deterministic:
        return
    # cuBLAS else takes workspace, and with it a way to add, as streams come.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # That is for finding reads of memory that nobody wrote, and costs a pass over each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if run.model.compile:
        config: Any = importlib.import_module("torch._inductor.config")
        # Timing else picks kernels. Older releases have no such switch.
        if hasattr(config, "deterministic"):
            config.deterministic = True
