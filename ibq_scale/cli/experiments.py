"""``ibq-scale experiments``: the paper's experiments at a small scale, and their document."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ibq_scale.cli.options import Family, argument, finite, flag, show
from ibq_scale.errors import UserError

STABILITY = "stability"
BENCH_OPTIONS = ("codes", "scales", "steps", "workers", "json")
OF_BENCH = "of the stability bench:"
FAMILY = Family("experiments", "the paper's experiments in small")
add_commands = FAMILY.add_commands


@FAMILY.command(
    "train and evaluate every configuration, or some, with each seed; or the stability bench",
    "photographs/ --only ibq-1024 vq-1024 --seeds 0 1",
    argument(
        "words",
        nargs="+",
        metavar="PICTURES",
        help="folder of photographs, cut into tiles. 'stability' before it: the stability bench, whose default is "
        "ten photographs of scikit-image and scikit-learn",
    ),
    argument("--to", type=Path, default=Path("runs/experiments"), metavar="DIR", help="default: runs/experiments"),
    argument("--only", nargs="+", default=[], metavar="NAME", help="configurations (default: all)"),
    argument("--seeds", nargs="+", type=int, metavar="N", help="default: 0 1 2"),
    argument("--codes", nargs="+", type=int, metavar="K", help=f"{OF_BENCH} codebook sizes (default: 1024 16384)"),
    argument("--scales", nargs="+", type=finite, metavar="M", help=f"{OF_BENCH} initial scales (0.01 0.1 1 10)"),
    argument("--steps", type=int, metavar="N", help=f"{OF_BENCH} steps of a curve (default: 96)"),
    argument("--workers", type=int, metavar="N", help=f"{OF_BENCH} processes of one thread (default: the cores)"),
    flag("--json", f"{OF_BENCH} print one JSON document"),
    usage="ibq-scale experiments run [-h] {PICTURES | stability [PICTURES]} [options]",
)
def _run(args: argparse.Namespace) -> int:
    """Run it again to go on: finished runs are skipped. 'run stability' measures usage over time on a frozen encoder
    for every quantizer, from codebooks of several initial scales (UR-AUC).
    """
    from ibq_scale.experiments.plan import SEEDS, trials
    from ibq_scale.experiments.run import run_trials

    if any(seed < 0 for seed in args.seeds or ()):
        raise UserError("--seeds must be 0 or more")
    first, *rest = args.words
    if first == STABILITY and len(rest) < 2:
        return _stability(args, Path(rest[0]) if rest else None)
    given = [f"--{name}" for name in BENCH_OPTIONS if getattr(args, name)]
    if rest or given:
        raise UserError(f"{' '.join([*rest, *given])}: only for 'experiments run stability [PICTURES]'")
    return run_trials(Path(first), args.to, trials(args.only, args.seeds or SEEDS))


def _stability(args: argparse.Namespace, pictures: Path | None) -> int:
    from ibq_scale.experiments.plan import SEEDS
    from ibq_scale.experiments.stability import CODES, SCALES, Sizes, trials
    from ibq_scale.experiments.stability_run import run_bench
    from ibq_scale.experiments.stability_tables import document, text_table

    for name in BENCH_OPTIONS[:-1]:
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) <= 0:
            raise UserError(f"--{name} must be above 0")
    chosen = trials(args.only, args.seeds or SEEDS, args.codes or CODES, args.scales or SCALES)
    sizes = Sizes() if args.steps is None else Sizes(steps=args.steps)
    curves = run_bench(pictures, args.to, chosen, sizes, args.workers or len(os.sched_getaffinity(0)))
    return show(args, document(curves), text_table(curves), indent=2)


@FAMILY.command("the configurations and their overrides of the preset", "")
def _list(args: argparse.Namespace) -> int:
    from ibq_scale.experiments.plan import CONFIGURATIONS, PRESET
    from ibq_scale.experiments.stability import RATE, VARIANTS

    for configuration in CONFIGURATIONS:
        print(f"{configuration.name:<16} {configuration.pictures:<12} {' '.join(configuration.overrides) or PRESET}")
    for variant in VARIANTS:
        print(f"{variant.name:<16} {STABILITY:<12} {' '.join((RATE, *variant.overrides))}")
    return 0


@FAMILY.command(
    "collect finished runs, draw the figures and fill the tables of docs/experiments.md",
    "--runs runs/experiments --docs docs",
    argument("--runs", type=Path, metavar="DIR", help="collect these first (default: use earlier results)"),
    argument("--docs", type=Path, default=Path("docs"), metavar="DIR", help="default: docs"),
)
def _report(args: argparse.Namespace) -> int:
    from ibq_scale.experiments import stability
    from ibq_scale.experiments.document import write_document
    from ibq_scale.experiments.results import RESULTS, collect, save

    if args.runs is not None:
        curves = stability.collect(args.runs)
        if curves:
            stability.save(curves, args.docs / stability.RESULTS)
        if any(args.runs.glob("*/seed-*")) or not curves:
            save(collect(args.runs), args.docs / RESULTS)
    for path in write_document(args.docs):
        print(path)
    return 0
