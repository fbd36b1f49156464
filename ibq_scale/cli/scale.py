"""``ibq-scale scale``: ladders of transformers, their laws, and simulated clusters."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ibq_scale.cli import simulate
from ibq_scale.cli.options import at_least_one, finite
from ibq_scale.cli.submit import add_settings, settings_of
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.ladder.schema import LadderConfig

Commands = argparse._SubParsersAction


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the family to the command line."""
    family = commands.add_parser("scale", help="ladders of sizes and budgets, and the laws they follow")
    leaves = family.add_subparsers(title="commands", metavar="COMMAND", required=True)
    plan = _ladder(leaves, "plan", "the rungs and their costs", "scale plan published machine.gpus=8 machine.nodes=4")
    plan.set_defaults(run=_plan)
    run = _ladder(
        leaves,
        "run",
        "train all rungs on this machine, then collect, fit and report",
        "scale run cpu tiles.pictures=photographs/ out=runs/ladder",
        "Run it again to go on: finished rungs are skipped, an interrupted one resumes.",
    )
    _fit_options(run)
    run.set_defaults(run=_run)
    submit = _ladder(
        leaves,
        "submit",
        "check all rungs and queue them as Slurm jobs",
        "scale submit published codes.train=s3://bucket/codes out=/shared/ladder --nodes 4 --time 24:00:00",
        "As 'ibq-scale submit' does with one run; finished rungs are skipped.",
    )
    _submit_options(submit)
    submit.set_defaults(run=_submit)
    collect = _ladder(leaves, "collect", "collect the results of finished rungs into results.json", "scale collect cpu")
    collect.set_defaults(run=_collect)
    fit = _ladder(
        leaves,
        "fit",
        "fit laws to collected results, predict, and write the HTML report",
        "scale fit published --flops 1e22 --flops 1e23",
    )
    _fit_options(fit)
    fit.set_defaults(run=_fit)
    simulate.add_command(leaves)


def _ladder(
    leaves: Commands[argparse.ArgumentParser], name: str, about: str, example: str, more: str = ""
) -> argparse.ArgumentParser:
    description = f"{about[0].upper()}{about[1:]}. {more}"
    parser = leaves.add_parser(name, help=about, description=description, epilog=f"example: ibq-scale {example}")
    parser.add_argument("ladder", metavar="LADDER", help="cpu, published, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--flops", type=finite, action="append", default=[], metavar="C", help="a budget to look at; may be repeated"
    )
    parser.add_argument("--replicas", type=int, default=1000, metavar="N", help="of the bootstrap (default 1000)")


def _submit_options(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs a rung, one behind the other")
    parser.add_argument("--dry-run", action="store_true", help="check, and submit nothing")


def _load(args: argparse.Namespace) -> LadderConfig:
    from ibq_scale.ladder.schema import load_ladder

    return load_ladder(args.ladder, args.overrides)


def _plan(args: argparse.Namespace) -> int:
    from ibq_scale.ladder.plan import documents, table
    from ibq_scale.ladder.rungs import plans_of, rungs_of

    ladder = _load(args)
    planned = list(plans_of(ladder, rungs_of(ladder)))
    print(json.dumps(documents(planned), indent=2) if args.json else "\n".join(table(planned)))
    return 0


def _run(args: argparse.Namespace) -> int:
    from ibq_scale.ladder.run import run_ladder

    at_least_one(args, "replicas")
    return run_ladder(_load(args)) or _collect(args, quiet=True) or _fit(args)


def _collect(args: argparse.Namespace, *, quiet: bool = False) -> int:
    from dataclasses import asdict

    from ibq_scale.ladder.results import RESULTS, collect, save
    from ibq_scale.ladder.rungs import rungs_of

    ladder = _load(args)
    results, missing = collect(rungs_of(ladder))
    path = ladder.folder / RESULTS
    save(results, path)
    if quiet:
        return 0
    if args.json:
        print(json.dumps({"results": [asdict(r) for r in results], "missing": missing, "file": str(path)}, indent=2))
        return 0
    for result in results:
        print(f"{result.name}: loss {result.loss:.4f} at step {result.steps:,}")
    print("\n".join([*(f"not finished: {name}" for name in missing), str(path)]))
    return 0


def _fit(args: argparse.Namespace) -> int:
    from ibq_scale.ladder.fit import document, fit_ladder, save
    from ibq_scale.ladder.report import text, write_report
    from ibq_scale.ladder.results import RESULTS, load
    from ibq_scale.ladder.rungs import rungs_of

    at_least_one(args, "replicas")
    if any(not budget > 0 for budget in args.flops):
        raise UserError("--flops must be above 0")
    ladder = _load(args)
    results = load(ladder.folder / RESULTS)
    found = {result.name for result in results}
    missing = [rung.name for rung in rungs_of(ladder) if rung.name not in found]
    fits = fit_ladder(results, flops=args.flops, replicas=args.replicas)
    values = document(fits)
    written = [save(values, ladder.folder), write_report(fits, missing, ladder.name, ladder.folder)]
    if args.json:
        print(json.dumps({"fits": values, "missing": missing, "files": [str(path) for path in written]}, indent=2))
    else:
        print("\n".join([*text(fits, missing), *map(str, written)]))
    return 0


def _submit(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from ibq_scale.cluster.profile import load_profile
    from ibq_scale.ladder.rungs import rungs_of
    from ibq_scale.ladder.submit import Order, submit_rungs

    flags = settings_of(args)
    cluster, profile = load_profile(args.cluster)
    order = Order(args.nodes, profile, cluster, flags, args.sbatch, args.chain, args.dry_run)
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
