"""What ``auto`` chooses, beside the presets' earlier constants: ``python -m tests.tools.auto_table [PRESET …]``.

One Markdown row for each preset and machine: the choice, a GPU's memory, the bytes sent and the milliseconds of a step
by the plan, then the step under the constants, and the CPU seconds of the search without the imports of torch.
"""

from __future__ import annotations

import sys
import time

from ibq_scale.config.layers import with_values
from ibq_scale.errors import UserError
from ibq_scale.scaling.auto import settle
from ibq_scale.scaling.plan import Plan, make_plan
from tests.scaling.test_auto import BEFORE, MACHINES, _run


def _step(plan: Plan) -> str:
    assert plan.roofline is not None
    fits = "" if plan.fits else " (does not fit)"
    sent = sum(transfer.sent for transfer in plan.communication)
    return f"{plan.memory.peak / 1e9:.1f} GB, {sent / 1e9:.2f} GB sent, {1000 * plan.roofline.total:.1f} ms{fits}"


def _forget() -> None:
    """Drops what earlier searches have counted."""
    modules = [module for name, module in sys.modules.items() if name.startswith("ibq_scale.scaling.")]
    for found in (value for module in modules for value in vars(module).values()):
        if hasattr(found, "cache_clear"):
            found.cache_clear()


def main(presets: list[str]) -> None:
    """Prints the table."""
    # Imports torch's decompositions and LPIPS.
    for preset in ("ar/tiny", "tokenizer/ibq-16384"):
        settle(_run(preset, "train.micro_batch=auto"), MACHINES[0])
    print("| preset | GPUs | auto | step | step before | search |\n|---|---|---|---|---|---|")
    for preset in presets or BEFORE:
        micro, zero, again = BEFORE[preset]
        for machine in MACHINES:
            run = _run(preset, world=machine.world)
            _forget()
            begin = time.process_time()
            settled, choices = settle(run, machine)
            spent = time.process_time() - begin
            chosen = ", ".join(str(choice.value) for choice in choices)
            before = {"train.micro_batch": micro, "deepspeed.config": zero, "model.activation_checkpointing": again}
            if "codebook_group" in {choice.key for choice in choices}:
                before["codebook_group"] = 0
            try:
                old = _step(make_plan(with_values(run, before), machine, mfu=0.5))
            except UserError:
                old = "refused: the batch does not divide"
            new = _step(make_plan(settled, machine, mfu=0.5))
            print(
                f"| {preset} | {machine.world} × {machine.device} | {chosen} | {new} | {old} | {spent:.1f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
