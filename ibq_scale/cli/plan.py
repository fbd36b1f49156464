"""``ibq-scale plan``: the needs of a run, before any GPU is reserved."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ibq_scale.cli.options import JSON, OVERRIDES, Family, argument, finite, real, show, whole
from ibq_scale.console import gigabytes, short
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ibq_scale.config.run import AnyRun
    from ibq_scale.data.geometry import Stream
    from ibq_scale.scaling.budget import MemoryBudget
    from ibq_scale.scaling.fitting import Switch
    from ibq_scale.scaling.plan import Machine, Plan
    from ibq_scale.scaling.prediction import Prediction, RunMeasured
COMMAND = Family()
add_commands = COMMAND.add_commands


@COMMAND.command(
    "parameters, FLOPs, memory, checkpoint and time of a run, without a GPU",
    "ar/xxl deepspeed.config=zero2 --device h100 --gpus 8 --nodes 4",
    argument("source", metavar="PRESET_OR_YAML_OR_RUN"),
    OVERRIDES,
    argument("--device", "--gpu", metavar="GPU", help="a100, h100, l40s …; cpu: this one"),
    real("--memory", "memory of one GPU (10⁹ bytes), instead of its own", above=0, metavar="GB"),
    whole("--gpus", "GPUs a node (default 1)"),
    whole("--nodes", "default 1"),
    real("--mfu", "assumed share of the peak, for the time", 0.45, above=0, metavar="SHARE"),
    real("--net", "of a GPU to other nodes, one direction (default 50)", above=0, metavar="GB/S"),
    argument("--data", metavar="URL", help="a prepared set: what its stream keeps and downloads"),
    argument("--samples", type=finite, metavar="N", help="with --bytes, of a set that is not there yet"),
    argument("--bytes", type=finite, metavar="B", help="with --samples; in shards of 64 MB"),
    argument("--measured", type=Path, metavar="FILE", help="a bench's JSON: its rate instead of --mfu"),
    JSON,
)
def _plan(args: argparse.Namespace) -> int:
    """Rehearse one micro-batch of the config's networks on tensors without memory and print a run's needs: memory of
    each GPU, disk, time. An unknown GPU gets no time. For a run's directory, print the step time and the peak memory
    that it measured too, and their ratios to the plan's.
    """
    from ibq_scale.scaling.auto import settle
    from ibq_scale.scaling.fitting import largest_micro_batch, switches
    from ibq_scale.scaling.plan import Rate, make_plan
    from ibq_scale.scaling.prediction import Prediction, measured_of_run

    run, machine, run_dir = _asked(args)
    measured = Rate.read(args.measured) if args.measured else None
    run, choices = settle(run, machine)
    plan = make_plan(run, machine, mfu=args.mfu, measured=measured)
    memory = machine.gpu_memory
    fitting = None if memory is None else largest_micro_batch(run, machine.world, memory)
    mends = () if memory is None or plan.fits else tuple(switches(run, machine.world, memory))
    stream = _stream(args, run, machine)
    found, predicted = measured_of_run(run_dir) if run_dir else None, Prediction.of(plan)
    document = _document(plan) | {"auto": choices, "data": stream, "largest_micro_batch": fitting, "switches": mends}
    if run_dir is not None:
        ratios = dict(predicted.ratios(found.step_s, found.peak_bytes)) if found else {}
        document |= {"predicted": predicted, "measured": found and asdict(found) | ratios}

    def lines() -> Iterator[str]:
        yield from _lines(plan, fitting, mends)
        if stream is not None:
            yield f"data{'':<32}{stream}"
        for choice in choices:
            yield f"auto: {choice.key}={choice.value} ({choice.reason})"
        if run_dir is not None:
            yield from _measured(run_dir, predicted, found)

    return show(args, document, lines(), indent=2)


def _asked(args: argparse.Namespace) -> tuple[AnyRun, Machine, Path | None]:
    """The run, its machine, and its directory if the plan is asked for one. UserError for wrong options."""
    from ibq_scale.config.layers import resolve
    from ibq_scale.scaling.plan import Machine
    from ibq_scale.scaling.prediction import machine_of_run
    from ibq_scale.scaling.profile import read_profile, this_cpu

    run_dir = Path(args.source) if (Path(args.source) / "config.yaml").is_file() else None
    ran = machine_of_run(run_dir) if run_dir and args.gpus is args.nodes is args.device is args.memory is None else None
    if args.mfu > 1:
        raise UserError(f"--mfu must be above 0 and at most 1, got {args.mfu}")
    run = resolve(str(run_dir / "config.yaml") if run_dir else args.source, args.overrides).config
    net = args.net * 1e9 if args.net else None
    if ran is not None:
        return run, replace(ran, net=net), run_dir
    memory, device, of_profile = args.memory * 1e9 if args.memory else None, args.device, args.device
    if device == "cpu":
        import torch

        device, of_profile = None, this_cpu(torch.get_num_threads())
    machine = Machine(args.gpus or 1, args.nodes or 1, device, memory, net, read_profile(of_profile))
    return run, machine, run_dir


def _stream(args: argparse.Namespace, run: AnyRun, machine: Machine) -> Stream | None:
    """What the stream of the data needs, where they are named."""
    from ibq_scale.data.geometry import SHARD_BYTES, Extent, Stream
    from ibq_scale.data.manifest import load_manifest

    if (args.samples is None) != (args.bytes is None) or (args.samples is not None and args.data):
        raise UserError("give the data as --data URL, or as --samples N --bytes B")
    if args.data:
        extent = load_manifest(args.data, "images" if run.task == "tokenizer" else "codes").extent
    elif args.samples:
        extent = Extent(max(1, round(args.bytes / SHARD_BYTES)), int(args.samples), int(args.bytes))
    else:
        return None
    return Stream.of([extent], run.data, run.data.cache_bytes, run.train.micro_batch * machine.gpus, machine.nodes)


def _document(plan: Plan) -> dict[str, object]:
    """The plan's fields and the figures derived from them."""
    values = asdict(plan)
    budget, machine = plan.memory, plan.machine
    values["memory"] |= {
        "passes": budget.passes,
        "step": budget.step,
        "peak": budget.peak,
        "host": budget.host,
        "gpu_memory": machine.gpu_memory,
        "fits": plan.fits,
    }
    values["communication"] = [asdict(t) | {"sent": t.sent} for t in plan.communication]
    if plan.roofline is not None:
        values["roofline"] |= {"passes": plan.roofline.passes, "total": plan.roofline.total}
    values["flops"] |= {"per_image": plan.flops.total, "per_step": plan.flops_per_step}
    values["machine"] |= {"world": machine.world, "peak_bf16": machine.known.peak_bf16 if machine.known else None}
    return values


def _lines(plan: Plan, fitting: int | None, mends: Sequence[Switch]) -> Iterator[str]:
    machine = plan.machine
    gpu = machine.known.name if machine.known else machine.device or "GPU"
    yield (
        f"{plan.name}: {machine.world} × {gpu} on {machine.nodes} node{'s' * (machine.nodes > 1)}; {plan.precision}, "
        f"DeepSpeed {plan.deepspeed} ({plan.sharding})"
    )
    yield (
        f"  batch {plan.global_batch:,} = {plan.micro_batch} micro × {plan.accumulation} accumulation × "
        f"{machine.world} GPUs; {plan.steps:,} steps, {plan.samples:,} images, {short(plan.tokens)} tokens"
    )
    yield f"\nparameters{'':<26}{short(sum(plan.parameters.values())):>10}"
    for name, number in plan.parameters.items():
        yield f"  {name:<34}{short(number):>10}"
    for name, number in plan.frozen.items():
        yield f"  {name + ', frozen':<34}{short(number):>10}"
    yield from _flops(plan)
    yield from _memory(plan.memory)
    yield from _fit(plan)
    if fitting is not None:
        yield f"  largest fitting micro-batch: {fitting or 'none'}"
    for mend in mends:
        yield f"  would fit with {' '.join(mend.words)}: {gigabytes(mend.peak)}"
    if plan.fits is False and not mends:
        yield "  no switch, and no two of them, make it fit: take more GPUs (--gpus, --nodes) or a smaller model"
    yield from _communication(plan)
    each, kept = gigabytes(plan.checkpoint_bytes), gigabytes(plan.storage_bytes)
    yield f"\ncheckpoint, each{'':<20}{each:>10}{kept:>12} kept at the most"
    yield from _time(plan)
    yield from _roofline(plan)
    for note in plan.notes:
        yield f"note: {note}"


def _flops(plan: Plan) -> Iterator[str]:
    flops = plan.flops
    yield f"\nFLOPs of training, an image{'':<9}{short(flops.total):>10}"
    for name, number in flops.parts.items():
        yield f"  {name:<34}{short(number):>10}{100 * number / flops.total:>7.1f} %"
    if flops.executed > 1.001 * flops.total:
        yield f"  {'done, with recomputation':<34}{short(flops.executed):>10}"
    if flops.optimizer:
        name = "Muon's iterations, beside these"
        yield f"  {name:<34}{short(flops.optimizer):>10}{100 * flops.optimizer / flops.total:>7.1f} %"
    if plan.task == "ar":
        again = flops.executed - flops.total
        parts = {"forward": flops.total / 3, "backward": flops.total * 2 / 3, "computed again": again}
        yield "  " + ", ".join(f"{name} {short(number)}" for name, number in parts.items())
    yield f"  {'a step':<34}{short(plan.flops_per_step):>10}"
    yield f"  = {flops.formula}"


def _memory(budget: MemoryBudget) -> Iterator[str]:
    host = budget.host > 0
    yield f"\n{'memory of a GPU':<36}{'passes':>10}{'step':>10}" + (f"{'host':>10}" if host else "")
    for line in budget.lines:
        cells = (line.passes, line.step, line.host) if host else (line.passes, line.step)
        yield f"  {line.name:<34}" + "".join(f"{gigabytes(cell) if cell else '':>10}" for cell in cells)
    total = (budget.passes, budget.step, budget.host) if host else (budget.passes, budget.step)
    yield f"  {'together':<34}" + "".join(f"{gigabytes(cell):>10}" for cell in total)
    yield f"  {'of it kept for the way back, an image':<38}{gigabytes(budget.kept_per_image):>6}"
    if budget.validation:
        yield f"  {'in a validation, averaged weights and all':<44}{gigabytes(budget.validation):>10}"


def _fit(plan: Plan) -> Iterator[str]:
    memory, peak = plan.machine.gpu_memory, plan.memory.peak
    if memory is None:
        yield f"  needs {gigabytes(peak)}; give --device or --memory to check the fit"
    elif plan.fits:
        yield f"  fits: {gigabytes(peak)} of {gigabytes(memory)}, {gigabytes(memory - peak)} free"
    else:
        yield f"  DOES NOT FIT: {gigabytes(peak)} of {gigabytes(memory)}, {gigabytes(peak - memory)} too much"


def _time(plan: Plan) -> Iterator[str]:
    time = plan.time
    if time.images_per_s is None or time.step_s is None or time.hours is None or time.gpu_hours is None:
        yield time.basis
        return
    yield f"time{'':<32}{time.hours:>8,.1f} h{time.gpu_hours:>12,.0f} GPU hours"
    yield f"  {time.step_s:.4g} s a step, {time.images_per_s:,.4g} images/s; {time.basis}"


def _measured(run_dir: Path, predicted: Prediction, found: RunMeasured | None) -> Iterator[str]:
    """Predicted beside measured. The peak is the allocator's, without CUDA's context."""
    if found is None:
        yield f"\n{run_dir} has fewer than two lines of metrics: nothing is measured yet"
        return
    yield f"\n{f'{run_dir}, steps {found.first} to {found.last}':<36}{'predicted':>12}{'measured':>12}{'ratio':>8}"
    ratios = predicted.ratios(found.step_s, found.peak_bytes)
    rows = (
        ("seconds of a step", predicted.step_s, f"{found.step_s:.4g} s", "plan_time_ratio"),
        ("peak memory", predicted.peak_bytes, gigabytes(found.peak_bytes), "plan_memory_ratio"),
    )
    for name, value, measured, key in rows:
        if value is None:
            yield f"  {name:<34}{'–':>12}{measured:>12}  no prediction for this device"
        else:
            said = f"{value:.4g} s" if key == "plan_time_ratio" else gigabytes(value)
            yield f"  {name:<34}{said:>12}{measured:>12}{ratios[key]:>8.3f}  {key}"


def _communication(plan: Plan) -> Iterator[str]:
    if not plan.communication:
        return
    yield f"\n{'a step sends, of each GPU':<36}{gigabytes(sum(t.sent for t in plan.communication)):>10}"
    for t in plan.communication:
        times = f"{t.times} × " if t.times > 1 else ""
        yield f"  {t.name:<34}{gigabytes(t.sent):>10}  {times}{t.kind} of {gigabytes(t.size)} over {t.ranks} GPUs"


def _roofline(plan: Plan) -> Iterator[str]:
    from ibq_scale.scaling.roofline import BASIS

    line = plan.roofline
    if line is None:
        return
    hours = line.total * plan.steps / 3600
    links = plan.machine.profile.links if plan.machine.profile else ()
    basis = f"{BASIS}; links: measured here {max(link.date for link in links)}" if links else BASIS
    yield f"time by the roofline{'':<16}{hours:>8,.1f} h{hours * plan.machine.world:>12,.0f} GPU hours; {basis}"
    yield (
        f"  {line.total:.4g} s a step: passes {line.passes:.3g} (products {line.products:.3g}, memory "
        f"{line.memory:.3g}), optimizer {line.optimizer:.3g}, exchange {line.exposed:.3g}"
    )
