"""``ibq-scale scale``: ladders of transformers, their laws, and simulated clusters."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ibq_scale.cli.options import JSON, OVERRIDES, Family, argument, finite, flag, real, show, whole
from ibq_scale.cli.submit import QUEUE, settings_of
from ibq_scale.console import gigabytes
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.cluster.submit import Request, Work
    from ibq_scale.config.run import AnyRun, TokenizerRun
    from ibq_scale.ladder.results import Result
    from ibq_scale.ladder.schema import LadderConfig
    from ibq_scale.scaling.devices import Device
    from ibq_scale.scaling.fabric import Fabric
    from ibq_scale.scaling.simulate import CodebookRow, Row

FIT = (
    argument(
        "--flops", type=finite, action="append", default=[], metavar="C", help="a budget to look at; may be repeated"
    ),
    whole("--replicas", "of the bootstrap", 1000),
)
FAMILY = Family("scale", "ladders of sizes and budgets, and the laws they follow")
add_commands = FAMILY.add_commands
LADDER = (argument("ladder", metavar="LADDER", help="cpu, published, or a YAML file"), OVERRIDES, JSON)


def _load(args: argparse.Namespace) -> LadderConfig:
    from ibq_scale.ladder.schema import load_ladder

    return load_ladder(args.ladder, args.overrides)


@FAMILY.command("the rungs and their costs", "published machine.gpus=8 machine.nodes=4", *LADDER)
def _plan(args: argparse.Namespace) -> int:
    from ibq_scale.ladder.plan import documents, table
    from ibq_scale.ladder.rungs import plans_of, rungs_of

    ladder = _load(args)
    planned = list(plans_of(ladder, rungs_of(ladder)))
    return show(args, documents(planned), table(planned), indent=2)


@FAMILY.command(
    "train all rungs on this machine, then collect, fit and report",
    "cpu tiles.pictures=photographs/ out=runs/ladder",
    *LADDER,
    *FIT,
)
def _run(args: argparse.Namespace) -> int:
    """Train all rungs on this machine, then collect, fit and report. Run it again to go on: finished rungs are
    skipped, an interrupted one resumes.
    """
    from ibq_scale.ladder.run import run_ladder

    ladder = _load(args)
    code = run_ladder(ladder)
    if code == 0:
        _collected(ladder)
    return code or _fit(args)


@FAMILY.command("collect the results of finished rungs into results.json", "cpu", *LADDER)
def _collect(args: argparse.Namespace) -> int:
    results, missing, path = _collected(_load(args))
    lines = [f"{result.name}: loss {result.loss:.4f} at step {result.steps:,}" for result in results]
    lines += [*(f"not finished: {name}" for name in missing), str(path)]
    return show(args, {"results": results, "missing": missing, "file": str(path)}, lines, indent=2)


def _collected(ladder: LadderConfig) -> tuple[list[Result], list[str], Path]:
    """Writes the file of results. Returns them, the names of unfinished rungs, and the file."""
    from ibq_scale.ladder.results import RESULTS, collect, save
    from ibq_scale.ladder.rungs import rungs_of

    results, missing = collect(rungs_of(ladder))
    save(results, ladder.folder / RESULTS)
    return results, missing, ladder.folder / RESULTS


@FAMILY.command(
    "fit laws to collected results, predict, and write the HTML report",
    "published --flops 1e22 --flops 1e23",
    *LADDER,
    *FIT,
)
def _fit(args: argparse.Namespace) -> int:
    from ibq_scale.ladder.fit import document, fit_ladder, save
    from ibq_scale.ladder.report import text, write_report
    from ibq_scale.ladder.results import RESULTS, load
    from ibq_scale.ladder.rungs import rungs_of

    if any(not budget > 0 for budget in args.flops):
        raise UserError("--flops must be above 0")
    ladder = _load(args)
    results = load(ladder.folder / RESULTS)
    found = {result.name for result in results}
    missing = [rung.name for rung in rungs_of(ladder) if rung.name not in found]
    fits = fit_ladder(results, flops=args.flops, replicas=args.replicas)
    values = document(fits)
    files = [str(save(values, ladder.folder)), str(write_report(fits, missing, ladder.name, ladder.folder))]
    values_and_files = {"fits": values, "missing": missing, "files": files}
    return show(args, values_and_files, [*text(fits, missing), *files], indent=2)


@FAMILY.command(
    "check all rungs and queue them as Slurm jobs",
    "published codes.train=s3://bucket/codes out=/shared/ladder --nodes 4 --time 24:00:00",
    *LADDER,
    *QUEUE,
    whole("--chain", "N jobs a rung, one behind the other", 1),
    flag("--dry-run", "check, and submit nothing"),
)
def _submit(args: argparse.Namespace) -> int:
    """Check all rungs and queue them as Slurm jobs. As 'ibq-scale submit' does with one run; finished rungs are
    skipped.
    """
    from ibq_scale.cluster.profile import load_profile
    from ibq_scale.cluster.submit import make_request
    from ibq_scale.ladder.rungs import rungs_of
    from ibq_scale.ladder.submit import submit_rungs

    cluster, profile = load_profile(args.cluster)

    def request_of(work: Work) -> Request:
        return make_request(work, args.nodes, profile, settings_of(args), args.sbatch)

    how = {"chain": args.chain, "cluster": cluster, "dry_run": args.dry_run}
    failed, rows = [], []
    for done in submit_rungs(rungs_of(_load(args)), request_of, **how):
        for check in done.checks:
            if check.level != "ok":
                named = replace(check, name=f"{done.rung.name}: {check.name}:")
                print(named.lines(0), file=sys.stderr, flush=True)
        failed += [done.rung.name] if done.failed else []
        state = "finished" if done.finished else "not submitted" if done.failed else "checked"
        rows.append({"rung": done.rung.name, "run": str(done.rung.folder), "jobs": done.jobs, "state": state})
        if not args.json:
            print(f"{done.rung.name}: {'submitted ' + ', '.join(done.jobs) if done.jobs else state}", flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))
    if failed:
        raise UserError(f"not submitted: {', '.join(failed)} (FAIL, above)")
    return 0


@FAMILY.command(
    "strong and weak scaling to 1,024 GPUs, and a codebook sharded or replicated",
    "ar/7b --device h100 --gpus 8 --net 50",
    argument("source", metavar="PRESET_OR_YAML"),
    OVERRIDES,
    argument("--device", "--gpu", required=True, metavar="GPU", help="as of 'ibq-scale plan'"),
    whole("--gpus", "a node, where tables begin", 8),
    whole("--most", "where they end", 1024),
    real("--link", "of a GPU within its node, one direction", above=0, metavar="GB/S"),
    real("--net", "of a GPU to other nodes, one direction (default 50)", above=0, metavar="GB/S"),
    JSON,
)
def _simulate(args: argparse.Namespace) -> int:
    """Of a transformer: images/s by ZeRO stage on ever more GPUs. Of a tokenizer: the codebook of 2^14 to 2^22 codes,
    replicated or over groups of ranks. From volumes and link speeds; nothing is measured.
    """
    from ibq_scale.config.layers import resolve
    from ibq_scale.config.run import TokenizerRun
    from ibq_scale.scaling.auto import settle
    from ibq_scale.scaling.devices import DEVICES, named
    from ibq_scale.scaling.plan import Machine
    from ibq_scale.scaling.profile import read_profile

    device = named(args.device)
    if device is None:
        raise UserError(f"--device {args.device} is not in the table ({', '.join(DEVICES)})")
    link, net = (None if value is None else value * 1e9 for value in (args.link, args.net))
    machine = Machine(args.gpus, 1, args.device, net=net, profile=read_profile(args.device))
    fabric = machine.fabric
    assert fabric is not None
    fabric = replace(fabric, link=link or fabric.link)
    run, _ = settle(resolve(args.source, args.overrides).config, machine)
    if isinstance(run, TokenizerRun):
        return _codebook(run, device, fabric, args)
    return _transformer(run, device, fabric, args)


def _transformer(run: AnyRun, device: Device, fabric: Fabric, args: argparse.Namespace) -> int:
    from ibq_scale.scaling.simulate import PAYS, ends, refused_stages, transformer_rows

    rows = transformer_rows(run, device, fabric, args.most)
    stops = [{"mode": mode, "stage": stage, "gpus": gpus} for mode, stage, gpus in ends(rows)]

    def lines() -> Iterator[str]:
        yield from _head(run, device, fabric)
        heads = ("GPUs", "micro × acc", "passes", "optimizer", "exchange", "images/s", "efficiency", "memory")
        for mode, stage, gpus in ends(rows):
            yield f"\n{mode} scaling, ZeRO-{stage}"
            yield "".join(f"{head:>12}" for head in heads)
            yield from (_row(row) for row in rows if (row.mode, row.stage) == (mode, stage))
            yield f"  pays up to {gpus:,} GPUs" if gpus else "  does not fit"
        for stage, reason in refused_stages(run).items():
            yield f"\nno ZeRO-{stage}: {reason}"
        yield f"\na doubling pays off from {PAYS} times the images/s"

    return show(args, {"rows": rows, "pays_up_to": stops}, lines(), indent=2)


def _row(row: Row) -> str:
    ms = [f"{1000 * value:,.1f} ms" for value in (row.time.passes, row.time.optimizer, row.time.exposed)]
    memory = gigabytes(row.peak) + ("" if row.fits else " !")
    cells = [f"{row.gpus:,}", f"{row.micro_batch} × {row.accumulation}", *ms, f"{row.images_per_s:,.0f}"]
    return "".join(f"{cell:>12}" for cell in [*cells, f"{100 * row.efficiency:.0f} %", memory])


def _codebook(run: TokenizerRun, device: Device, fabric: Fabric, args: argparse.Namespace) -> int:
    from ibq_scale.scaling.fitting import other_bytes
    from ibq_scale.scaling.simulate import best_groups, codebook_rows

    taken = other_bytes(run, fabric.node)
    rows = codebook_rows(run, device, fabric, args.most, taken)
    best = best_groups(rows)

    def lines() -> Iterator[str]:
        yield from _head(run, device, fabric)
        micro = run.train.micro_batch
        yield f"codes of {run.quantizer.dim}, micro-batch {micro}; the rest of the run: {gigabytes(taken)}"
        yield f"\n{'K':>10}{'GPUs':>8}{'products':>12}{'replicated':>22}{'over all':>22}{'best group':>22}"
        of = {(row.codes, row.gpus, row.group): row for row in rows}
        for quickest in best:
            codes, gpus = quickest.codes, quickest.gpus
            whole, shared = (of[codes, gpus, group] for group in (1, gpus))
            cells = [_cell(whole), _cell(shared), f"{quickest.group}: {_cell(quickest)}"]
            yield f"{codes:>10,}{gpus:>8,}{1000 * whole.products:>9,.1f} ms" + "".join(f"{cell:>22}" for cell in cells)
        yield "\nexchange and optimizer of a step of one micro-batch, beside the products; memory; !: does not fit"

    return show(args, {"rows": rows, "best": best}, lines(), indent=2)


def _cell(row: CodebookRow) -> str:
    return f"{1000 * (row.exchange + row.optimizer):,.1f} ms {gigabytes(row.bytes)}" + ("" if row.fits else " !")


def _head(run: AnyRun, device: Device, fabric: Fabric) -> Iterator[str]:
    from ibq_scale.scaling.roofline import BASIS

    yield (
        f"{run.name} on {device.name}, {fabric.node} a node: {gigabytes(fabric.link)}/s within it, "
        f"{gigabytes(fabric.net)}/s a GPU between nodes"
    )
    yield BASIS
