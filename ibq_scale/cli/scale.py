"""``ibq-scale scale``: ladders of transformers, their laws, and simulated clusters."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ibq_scale.cli import simulate
from ibq_scale.cli.options import (
    JSON,
    OVERRIDES,
    Argument,
    Commands,
    add_command,
    add_family,
    argument,
    finite,
    flag,
    show,
    whole,
)
from ibq_scale.cli.submit import QUEUE, settings_of
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.ladder.results import Result
    from ibq_scale.ladder.schema import LadderConfig

FIT = (
    argument(
        "--flops", type=finite, action="append", default=[], metavar="C", help="a budget to look at; may be repeated"
    ),
    whole("--replicas", "of the bootstrap", 1000),
)


def add_commands(commands: Commands) -> None:
    family = add_family(commands, "scale", "ladders of sizes and budgets, and the laws they follow")

    def add(
        name: str,
        run: Callable[[argparse.Namespace], int],
        about: str,
        example: str,
        *more: Argument,
        details: str = "",
    ) -> None:
        details = f"{about[0].upper()}{about[1:]}. {details}"
        ladder = argument("ladder", metavar="LADDER", help="cpu, published, or a YAML file")
        add_command(
            family,
            name,
            run,
            ladder,
            OVERRIDES,
            JSON,
            *more,
            about=about,
            details=details,
            example=f"scale {name} {example}",
        )

    add("plan", _plan, "the rungs and their costs", "published machine.gpus=8 machine.nodes=4")
    add(
        "run",
        _run,
        "train all rungs on this machine, then collect, fit and report",
        "cpu tiles.pictures=photographs/ out=runs/ladder",
        *FIT,
        details="Run it again to go on: finished rungs are skipped, an interrupted one resumes.",
    )
    add(
        "submit",
        _submit,
        "check all rungs and queue them as Slurm jobs",
        "published codes.train=s3://bucket/codes out=/shared/ladder --nodes 4 --time 24:00:00",
        *QUEUE,
        whole("--chain", "N jobs a rung, one behind the other", 1),
        flag("--dry-run", "check, and submit nothing"),
        details="As 'ibq-scale submit' does with one run; finished rungs are skipped.",
    )
    add("collect", _collect, "collect the results of finished rungs into results.json", "cpu")
    add(
        "fit",
        _fit,
        "fit laws to collected results, predict, and write the HTML report",
        "published --flops 1e22 --flops 1e23",
        *FIT,
    )
    simulate.add_to(family)


def _load(args: argparse.Namespace) -> LadderConfig:
    from ibq_scale.ladder.schema import load_ladder

    return load_ladder(args.ladder, args.overrides)


def _plan(args: argparse.Namespace) -> int:
    from ibq_scale.ladder.plan import documents, table
    from ibq_scale.ladder.rungs import plans_of, rungs_of

    ladder = _load(args)
    planned = list(plans_of(ladder, rungs_of(ladder)))
    return show(args, documents(planned), table(planned), indent=2)


def _run(args: argparse.Namespace) -> int:
    from ibq_scale.ladder.run import run_ladder

    ladder = _load(args)
    code = run_ladder(ladder)
    if code == 0:
        _collected(ladder)
    return code or _fit(args)


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


def _submit(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from ibq_scale.cluster.profile import load_profile
    from ibq_scale.ladder.rungs import rungs_of
    from ibq_scale.ladder.submit import Order, submit_rungs

    cluster, profile = load_profile(args.cluster)
    order = Order(args.nodes, profile, cluster, settings_of(args), args.sbatch, args.chain, args.dry_run)
    failed, rows = [], []
    for done in submit_rungs(rungs_of(_load(args)), order):
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
