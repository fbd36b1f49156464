"""DeepSpeed's JSON, completed from the run: one source for batch sizes, precision and clipping.

DeepSpeed 0.19.8 ignores unknown top-level keys, and its batch fields may contradict the run's. Both are refused here.
Its defaults: gradient_clipping 1.0, reductions in the model's dtype.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ibq_scale.config.base import AUTO, merged
from ibq_scale.config.batch import accumulation_steps
from ibq_scale.config.run import AnyRun, ARRun
from ibq_scale.documents import read_json
from ibq_scale.errors import UserError

# Set from the run. In a JSON they could only repeat or contradict it.
DERIVED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optimizer.grad_clip",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "optimizer": "optimizer",
    "scheduler": "schedule",
}
STAGES = (0, 1, 2, 3)
UNSETTLED = "zero1"
OFFLOADS = ("offload_optimizer", "offload_param")
ALLOWED = {
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "data_types",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "aio",
    "timers",
    "checkpoint",
    "compile",
    "seq_parallel_communication_data_type",
}


def find_config(name: str) -> Path:
    """A name in deepspeed_configs/ (beside the package in a checkout, inside it when installed), or a path.

    ``auto`` is `UNSETTLED` until `scaling.auto` settles it.
    """
    name = UNSETTLED if name == AUTO else name
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"deepspeed.config: {name} not found")
        return path
    for folder in _folders():
        if (folder / f"{name}.json").is_file():
            return folder / f"{name}.json"
    known = ", ".join(config_names())
    raise UserError(f"deepspeed.config: no '{name}': take one of {known}, or give the path of a .json file")


def config_names() -> list[str]:
    """Names of the files in deepspeed_configs/."""
    return sorted({p.stem for folder in _folders() for p in folder.glob("*.json")})


def _folders() -> list[Path]:
    package = Path(__file__).resolve().parents[1]
    return [package / "deepspeed_configs", package.parent / "deepspeed_configs"]


def deepspeed_config(run: AnyRun, world_size: int) -> dict[str, Any]:
    """The config for ``deepspeed.initialize``. UserError for unknown or derived keys, or an unreadable file."""
    path = find_config(run.deepspeed.config)
    try:
        values = read_json(path)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected one JSON object")
    values = merged(values, run.deepspeed.overrides)
    for key in values:
        if key in DERIVED:
            raise UserError(f"{path.name}: '{key}' follows from {DERIVED[key]}: set it there, not in DeepSpeed's JSON")
        if key not in ALLOWED:
            near = difflib.get_close_matches(key, ALLOWED, n=1)
            raise UserError(f"{path.name}: unknown key '{key}'" + (f", did you mean '{near[0]}'?" if near else ""))
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{path.name}: zero_optimization is an object, got {zero!r:.100}")
    stage = zero.get("stage", 0)
    if stage not in STAGES:
        raise UserError(f"{path.name}: ZeRO stage {stage!r} does not exist: take one of {STAGES}")
    refused = refusal(run, zero)
    if refused is not None:
        raise UserError(f"{path.name}: {refused}")
    accumulation = accumulation_steps(run.train, world_size)
    return unsharded(values, run, world_size) | {
        "train_batch_size": run.train.global_batch,
        "train_micro_batch_size_per_gpu": run.train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.optimizer.grad_clip,
        "bf16": {"enabled": run.train.precision == "bf16"},
        # The trainer prints its own lines. DeepSpeed's default is one every 10 steps.
        "steps_per_print": 2**62,
    }


def refusal(run: AnyRun, zero: dict[str, Any]) -> str | None:
    """Why this run cannot train with this ``zero_optimization``, or None if it can."""
    stage = zero.get("stage", 0)
    if stage == 0 and run.train.precision == "bf16":
        # DeepSpeed 0.19.8 accumulates in bf16 there, and bf16 sums lose small gradients.
        return "without ZeRO there are no fp32 weights under bf16: take zero1, or train.precision=fp32"
    if stage == 3 and run.model.compile:
        return "ZeRO-3 gathers weights in hooks that torch.compile cannot trace: set model.compile=false"
    if stage == 3 and isinstance(run, ARRun) and run.model.fp8:
        return (
            "ZeRO-3 frees gathered weights after the forward pass, and torchao keeps them for the backward pass: "
            "take zero2, or model.fp8=false"
        )
    if run.optimizer.kind == "muon" and (stage == 3 or any(offloaded(zero, key) for key in OFFLOADS)):
        return (
            "Muon needs whole matrices on the GPU, ZeRO-3 cuts and offloading moves them: take zero1 or zero2, or "
            "optimizer.kind=adam"
        )
    return None


def offloaded(zero: dict[str, Any], key: str) -> bool:
    """Whether `key`, one of `OFFLOADS`, moves states off the GPU."""
    return zero.get(key, {}).get("device", "none") not in ("none", None)


def zero_words(stage: int, world_size: int) -> str:
    """A network's ZeRO stage in words."""
    return "ZeRO off: one rank has nothing to share" if stage == 0 and world_size == 1 else f"ZeRO-{stage}"


def unsharded(values: dict[str, Any], run: AnyRun, world_size: int) -> dict[str, Any]:
    """`values` without ZeRO on a single rank, since ZeRO would only copy gradients and weights there.

    bf16 keeps its stage, since ZeRO holds the fp32 weights. Offloading keeps it to move states to the host.
    """
    zero = values.get("zero_optimization", {})
    if world_size > 1 or run.train.precision == "bf16" or any(offloaded(zero, key) for key in OFFLOADS):
        return values
    return values | {"zero_optimization": zero | {"stage": 0}}
