"""Makes DeepSpeed engines. The settings avoid what is inexact or broken in 0.19.8."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ibq_scale.malloc import keep_freed_memory
from ibq_scale.models.muon import Muon
from ibq_scale.profiling import part
from ibq_scale.zero.gradients import reduction, scatter_gradients
from ibq_scale.zero.memory import BUCKET
from ibq_scale.zero.muon import find_parts

Refuses = Callable[[torch.Tensor], torch.Tensor]
"""Of the gradient's norm: whether no rank takes the step. A bool scalar on the device, the same on every rank."""
_refuses: Refuses | None = None
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "reduce_scatter_tensor")


def make_engine(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: torch.device
) -> Any:
    """A DeepSpeed engine around `module` on the process group that already exists."""
    import deepspeed

    begin_deepspeed(device)
    _import_muon()
    engine, _, _, _ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=_with_bucket(config, module), dist_init_required=False
    )
    if engine.dp_world_size == 1 and engine.zero_optimization_stage() == 0:
        # The mean over one rank: 0.19.8 would copy all gradients into a buffer and back.
        engine.enable_backward_allreduce = False
    elif engine.dp_world_size > 1 and reduction(config) == "reduce-scatter":
        scatter_gradients(engine.optimizer)
    if isinstance(optimizer, Muon) and engine.zero_optimization_stage() > 0:
        find_parts(engine, optimizer)
    return engine


def _with_bucket(config: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """A bucket of gradients no larger than the network, since DeepSpeed (0.19.8) allocates it whole."""
    zero = config.get("zero_optimization", {})
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
    bucket = min(parameters, int(zero.get("reduce_bucket_size", BUCKET)))
    return config | {"zero_optimization": zero | {"reduce_bucket_size": bucket}}


def begin_deepspeed(device: torch.device) -> None:
    """Lets DeepSpeed take over torch's process group, once. Call it before anything of DeepSpeed's."""
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if deepspeed.comm.is_initialized():
        return
    # It warns of optimizers that are not listed.
    ZERO_SUPPORTED_OPTIMIZERS.append(Muon)
    deepspeed.logger.setLevel(logging.WARNING)
    # 0.19.8 calls collectives by names deprecated in torch 2.14. The user cannot change it.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce for minutes at the first start. A killed build leaves a
        # lock and hangs the next one. gloo's all-reduce suffices for small CPU runs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # 0.19.8 frees all gradients at the end of a step.
        keep_freed_memory()
    _take_norms_in_fp32()
    _wait_less()
    _refuse_steps()
    deepspeed.init_distributed(auto_mpi_discovery=False)


def _import_muon() -> None:
    """Imports DeepSpeed's Muon without torch._inductor, to save 2 CPU s and 150 MB a rank.

    DeepSpeed 0.19.8 imports this module to test an optimizer's class. The module compiles three functions at its
    import, and nothing here calls them.
    """
    compile_ = torch.compile
    vars(torch)["compile"] = lambda function=None, **_: function or (lambda decorated: decorated)
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        vars(torch)["compile"] = compile_


def _refuse_steps() -> None:
    """Lets `step` refuse a gradient by its norm: a refused norm is tested as if it were not finite.

    The host reads the norm for this test anyway.
    """
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    is_invalid = bf16_optimizer.is_invalid_grad_norm
    for module in (bf16_optimizer, stage3, stage_1_and_2):
        module.is_invalid_grad_norm = lambda norm: is_invalid(_judged(norm))


def _judged(norm: Any) -> Any:
    """Infinity for a refused norm. `_refuses` is asked once a step, while clipping tests the norm again."""
    global _refuses
    refuses, _refuses = _refuses, None
    return norm if refuses is None else norm.masked_fill(refuses(norm), torch.inf)


def always(norm: torch.Tensor) -> torch.Tensor:
    """Refuses every step."""
    return torch.ones_like(norm, dtype=torch.bool)


def _take_norms_in_fp32() -> None:
    """Makes ZeRO's gradient norm fp32, as the norm without ZeRO. 0.19.8 would copy each gradient to fp64 first.

    The copy of the largest gradient took 8 bytes an element. The copies took a twelfth of a CPU's step under ZeRO-2.
    """
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for stage in (stage_1_and_2, stage3):
        stage.get_norm_dtype = lambda: torch.float32


def _wait_less() -> None:
    """Removes waits for the device from ZeRO's step, except for one read of the gradient norm.

    0.19.8 copies a constant from the host. It searches bf16 gradients for infinities before it tests their norm, and
    reads the norm again to decide on clipping. Multiplying by a factor of 1 instead changes no bit.
    """
    from deepspeed.runtime import bf16_optimizer, utils
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    def mark_invalid(norm: torch.Tensor, device: object = None, val: float = -1.0) -> None:
        norm.masked_fill_(~norm.isfinite(), -1.0)

    for module in (utils, stage3, stage_1_and_2):
        module.mask_nan_or_inf_with_val_inplace = mark_invalid

    def clip(input_tensors: list[torch.Tensor], max_norm: float, global_norm: torch.Tensor, mpu: object) -> None:
        factor = (max_norm / (global_norm + 1e-6)).clamp(max=1.0)
        for tensor in input_tensors:
            tensor.mul_(factor)

    bf16_optimizer.clip_tensors_by_global_norm = clip
    search = stage_1_and_2.DeepSpeedZeroOptimizer.check_overflow

    def check_overflow(self: Any, partition_gradients: bool = True) -> None:
        if self.cpu_offload or not self.compute_grad_norm:
            search(self, partition_gradients)

    stage_1_and_2.DeepSpeedZeroOptimizer.check_overflow = check_overflow


def discriminator_config(config: dict[str, Any]) -> dict[str, Any]:
    """The small discriminator's config: ZeRO-1 at any stage of the generator (0 stays 0), and no clipping."""
    stage = min(1, config.get("zero_optimization", {}).get("stage", 0))
    return config | {"zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}


def step(engine: Any, refuses: Refuses | None = None) -> bool:
    """Applies the accumulated gradient, if the accumulation is complete. Collective.

    False if the gradient was not finite on some rank, or `refuses` returned true. No rank applies it then.
    """
    global _refuses
    _refuses = refuses
    with part("optimizer"):
        if engine.is_gradient_accumulation_boundary() and not hasattr(engine.optimizer, "overflow"):
            # ZeRO and bf16 optimizers test for this (DeepSpeed 0.19.8). A plain optimizer, stage 0 in fp32, does not.
            # Its gradients are means over the ranks by now, so every rank gets the same result.
            grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            # The other optimizers set it too, for `gradient_norm`.
            engine._global_grad_norm = norm
            if not bool(_judged(norm).isfinite()):
                for parameter in engine.module.parameters():
                    parameter.grad = None
                # It fails without gradients (0.19.8).
                engine.clip_fp32_gradients = lambda: None
                engine.step()
                del engine.clip_fp32_gradients
                return False
        engine.step()
        return bool(engine.was_step_applied())


def wrap_collectives(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts `wrap` around every later collective of DeepSpeed in this process, for measurements."""
    import deepspeed.comm.comm

    backend = deepspeed.comm.comm.cdb
    for name in COLLECTIVES:
        setattr(backend, name, wrap(getattr(backend, name)))


def gradient_norm(engine: Any, device: torch.device) -> torch.Tensor:
    """The norm of the last step before clipping, 0 if the engine takes none."""
    norm = engine.get_global_grad_norm()
    # `norm or 0.0` would read the norm, and a copy of 0 from the host would wait for the device too.
    return torch.zeros((), device=device) if norm is None else torch.as_tensor(norm, device=device)


def set_rates(engine: Any, lr: float, decay: float | None = None) -> None:
    """Sets the next step's learning rate except of frozen groups, and the decay of the groups with a decay."""
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0 if group.get("frozen") else lr
        if decay is not None and group["weight_decay"] > 0:
            group["weight_decay"] = decay
