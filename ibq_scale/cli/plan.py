"""``ibq-scale plan``: the needs of a run, before any GPU is reserved."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ibq_scale.cli.options import at_least_one, finite
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


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "plan",
        help="parameters, FLOPs, memory, checkpoint and time of a run, without a GPU",
        description="Rehearse one micro-batch of the config's networks on tensors without memory and print a "
        "run's needs: memory of each GPU, disk, time. An unknown GPU gets no time. For a run's directory, print the "
        "step time and the peak memory that it measured too, and their ratios to the plan's.",
        epilog="example: ibq-scale plan ar/xxl deepspeed.config=zero2 --device h100 --gpus 8 --nodes 4",
    )
    parser.add_argument("source", metavar="PRESET_OR_YAML_OR_RUN")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--device", "--gpu", metavar="GPU", help="a100, h100, l40s …; cpu: this one")
    parser.add_argument("--memory", type=finite, metavar="GB", help="memory of one GPU (10⁹ bytes), instead of its own")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs a node (default 1)")
    parser.add_argument("--nodes", type=int, metavar="N", help="default 1")
    parser.add_argument(
        "--mfu",
        type=finite,
        default=0.45,
        metavar="SHARE",
        help="assumed share of the peak (default 0.45), for the time",
    )
    parser.add_argument(
        "--net", type=finite, metavar="GB/S", help="of a GPU to other nodes, one direction (default 50)"
    )
    parser.add_argument("--data", metavar="URL", help="a prepared set: what its stream keeps and downloads")
    parser.add_argument("--samples", type=finite, metavar="N", help="with --bytes, of a set that is not there yet")
    parser.add_argument("--bytes", type=finite, metavar="B", help="with --samples; in shards of 64 MB")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="a bench's JSON: its rate instead of --mfu")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
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
    if args.json:
        more: dict[str, object] = {
            "auto": [asdict(choice) for choice in choices],
            "data": stream and asdict(stream),
            "largest_micro_batch": fitting,
            "switches": [asdict(mend) for mend in mends],
        }
        if run_dir is not None:
            more["predicted"] = asdict(predicted)
            more["measured"] = found and asdict(found) | dict(predicted.ratios(found.step_s, found.peak_bytes))
        print(json.dumps(_document(plan) | more, indent=2))
    else:
        _print(plan, fitting, mends)
        if stream is not None:
            print(f"data{'':<32}{stream}")
        for choice in choices:
            print(f"auto: {choice.key}={choice.value} ({choice.reason})")
        if run_dir is not None:
            _print_measured(run_dir, predicted, found)
    return 0


def _asked(args: argparse.Namespace) -> tuple[AnyRun, Machine, Path | None]:
    """The run, its machine, and its directory if the plan is asked for one. UserError for wrong options."""
    from ibq_scale.config.layers import resolve
    from ibq_scale.scaling.plan import Machine
    from ibq_scale.scaling.prediction import machine_of_run
    from ibq_scale.scaling.profile import read_profile, this_cpu

    run_dir = Path(args.source) if (Path(args.source) / "config.yaml").is_file() else None
    ran = machine_of_run(run_dir) if run_dir and args.gpus is args.nodes is args.device is args.memory is None else None
    args.gpus, args.nodes = (1 if number is None else number for number in (args.gpus, args.nodes))
    at_least_one(args, "gpus", "nodes")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu must be above 0 and at most 1, got {args.mfu}")
    if args.memory is not None and args.memory <= 0:
        raise UserError(f"--memory must be above 0 GB, got {args.memory}")
    run = resolve(str(run_dir / "config.yaml") if run_dir else args.source, args.overrides).config
    if args.net is not None and args.net <= 0:
        raise UserError(f"--net must be above 0 GB/s, got {args.net}")
    net = args.net * 1e9 if args.net else None
    if ran is not None:
        return run, replace(ran, net=net), run_dir
    memory, device = args.memory * 1e9 if args.memory else None, args.device
    if device == "cpu":
        import torch

        profile = read_profile(this_cpu(torch.get_num_threads()))
        return run, Machine(args.gpus, args.nodes, None, memory, net, profile), run_dir
    return run, Machine(args.gpus, args.nodes, device, memory, net, read_profile(device)), run_dir


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


def _print(plan: Plan, fitting: int | None, mends: Sequence[Switch]) -> None:
    machine = plan.machine
    gpu = machine.known.name if machine.known else machine.device or "GPU"
    print(
        f"{plan.name}: {machine.world} × {gpu} on {machine.nodes} node{'s' * (machine.nodes > 1)}; {plan.precision}, "
        f"DeepSpeed {plan.deepspeed} ({plan.sharding})"
    )
    print(
        f"  batch {plan.global_batch:,} = {plan.micro_batch} micro × {plan.accumulation} accumulation × "
        f"{machine.world} GPUs; {plan.steps:,} steps, {plan.samples:,} images, {short(plan.tokens)} tokens"
    )
    print(f"\nparameters{'':<26}{short(sum(plan.parameters.values())):>10}")
    for name, number in plan.parameters.items():
        print(f"  {name:<34}{short(number):>10}")
    for name, number in plan.frozen.items():
        print(f"  {name + ', frozen':<34}{short(number):>10}")
    _print_flops(plan)
    _print_memory(plan.memory)
    _print_fit(plan)
    if fitting is not None:
        print(f"  largest fitting micro-batch: {fitting or 'none'}")
    for mend in mends:
        print(f"  would fit with {' '.join(mend.words)}: {gigabytes(mend.peak)}")
    if plan.fits is False and not mends:
        print("  no switch, and no two of them, make it fit: take more GPUs (--gpus, --nodes) or a smaller model")
    _print_communication(plan)
    each, kept = gigabytes(plan.checkpoint_bytes), gigabytes(plan.storage_bytes)
    print(f"\ncheckpoint, each{'':<20}{each:>10}{kept:>12} kept at the most")
    _print_time(plan)
    _print_roofline(plan)
    for note in plan.notes:
        print(f"note: {note}")


def _print_flops(plan: Plan) -> None:
    flops = plan.flops
    print(f"\nFLOPs of training, an image{'':<9}{short(flops.total):>10}")
    for name, number in flops.parts.items():
        print(f"  {name:<34}{short(number):>10}{100 * number / flops.total:>7.1f} %")
    if flops.executed > 1.001 * flops.total:
        print(f"  {'done, with recomputation':<34}{short(flops.executed):>10}")
    if flops.optimizer:
        name = "Muon's iterations, beside these"
        print(f"  {name:<34}{short(flops.optimizer):>10}{100 * flops.optimizer / flops.total:>7.1f} %")
    if plan.task == "ar":
        again = flops.executed - flops.total
        parts = {"forward": flops.total / 3, "backward": flops.total * 2 / 3, "computed again": again}
        print("  " + ", ".join(f"{name} {short(number)}" for name, number in parts.items()))
    print(f"  {'a step':<34}{short(plan.flops_per_step):>10}")
    print(f"  = {flops.formula}")


def _print_memory(budget: MemoryBudget) -> None:
    host = budget.host > 0
    print(f"\n{'memory of a GPU':<36}{'passes':>10}{'step':>10}" + (f"{'host':>10}" if host else ""))
    for line in budget.lines:
        cells = (line.passes, line.step, line.host) if host else (line.passes, line.step)
        print(f"  {line.name:<34}" + "".join(f"{gigabytes(cell) if cell else '':>10}" for cell in cells))
    total = (budget.passes, budget.step, budget.host) if host else (budget.passes, budget.step)
    print(f"  {'together':<34}" + "".join(f"{gigabytes(cell):>10}" for cell in total))
    print(f"  {'of it kept for the way back, an image':<38}{gigabytes(budget.kept_per_image):>6}")
    if budget.validation:
        print(f"  {'in a validation, averaged weights and all':<44}{gigabytes(budget.validation):>10}")


def _print_fit(plan: Plan) -> None:
    memory, peak = plan.machine.gpu_memory, plan.memory.peak
    if memory is None:
        print(f"  needs {gigabytes(peak)}; give --device or --memory to check the fit")
    elif plan.fits:
        print(f"  fits: {gigabytes(peak)} of {gigabytes(memory)}, {gigabytes(memory - peak)} free")
    else:
        print(f"  DOES NOT FIT: {gigabytes(peak)} of {gigabytes(memory)}, {gigabytes(peak - memory)} too much")


def _print_time(plan: Plan) -> None:
    time = plan.time
    if time.images_per_s is None or time.step_s is None or time.hours is None or time.gpu_hours is None:
        print(time.basis)
        return
    print(f"time{'':<32}{time.hours:>8,.1f} h{time.gpu_hours:>12,.0f} GPU hours")
    print(f"  {time.step_s:.4g} s a step, {time.images_per_s:,.4g} images/s; {time.basis}")


def _print_measured(run_dir: Path, predicted: Prediction, found: RunMeasured | None) -> None:
    """Predicted beside measured. The peak is the allocator's, without CUDA's context."""
    if found is None:
        print(f"\n{run_dir} has fewer than two lines of metrics: nothing is measured yet")
        return
    print(f"\n{f'{run_dir}, steps {found.first} to {found.last}':<36}{'predicted':>12}{'measured':>12}{'ratio':>8}")
    ratios = predicted.ratios(found.step_s, found.peak_bytes)
    rows = (
        ("seconds of a step", predicted.step_s, f"{found.step_s:.4g} s", "plan_time_ratio"),
        ("peak memory", predicted.peak_bytes, gigabytes(found.peak_bytes), "plan_memory_ratio"),
    )
    for name, value, measured, key in rows:
        if value is None:
            print(f"  {name:<34}{'–':>12}{measured:>12}  no prediction for this device")
        else:
            said = f"{value:.4g} s" if key == "plan_time_ratio" else gigabytes(value)
            print(f"  {name:<34}{said:>12}{measured:>12}{ratios[key]:>8.3f}  {key}")


def _print_communication(plan: Plan) -> None:
    if not plan.communication:
        return
    print(f"\n{'a step sends, of each GPU':<36}{gigabytes(sum(t.sent for t in plan.communication)):>10}")
    for t in plan.communication:
        times = f"{t.times} × " if t.times > 1 else ""
        print(f"  {t.name:<34}{gigabytes(t.sent):>10}  {times}{t.kind} of {gigabytes(t.size)} over {t.ranks} GPUs")


def _print_roofline(plan: Plan) -> None:
    from ibq_scale.scaling.roofline import BASIS

    line = plan.roofline
    if line is None:
        return
    hours = line.total * plan.steps / 3600
    links = plan.machine.profile.links if plan.machine.profile else ()
    basis = f"{BASIS}; links: measured here {max(link.date for link in links)}" if links else BASIS
    print(f"time by the roofline{'':<16}{hours:>8,.1f} h{hours * plan.machine.world:>12,.0f} GPU hours; {basis}")
    print(
        f"  {line.total:.4g} s a step: passes {line.passes:.3g} (products {line.products:.3g}, memory "
        f"{line.memory:.3g}), optimizer {line.optimizer:.3g}, exchange {line.exposed:.3g}"
    )
