"""``ibq-scale submit``: a run into Slurm's queue, after everything that can be checked was."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from ibq_scale.cli.ranks import at_least_one
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.cluster.checks import Check
    from ibq_scale.cluster.submit import Request

# Flags that a cluster's profile has too, under the same name.
SETTINGS = (
    ("partition", str, "NAME", ""),
    ("account", str, "NAME", ""),
    ("qos", str, "NAME", ""),
    ("constraint", str, "LIST", "features that nodes must have"),
    ("time", str, "LIMIT", "HH:MM:SS or DAYS-HH:MM:SS"),
    ("mem", str, "SIZE", "of a node; 0: all of it"),
    ("gpu", str, "GPU", "h100, a100-40gb …: to check that the run fits"),
    ("gpus-per-node", int, "N", "0: ranks on CPUs"),
    ("ntasks-per-node", int, "N", "ranks (default: one a GPU)"),
    ("cpus-per-task", int, "N", ""),
)


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "submit",
        help="check a run and submit it to Slurm",
        description="Check a run, copy code and config to RUN/submitted, fill slurm/train_*.sbatch and submit it. "
        "Flags win over the cluster's profile (~/.config/ibq-scale/clusters.yaml), that over the file's own lines.",
        epilog="example: ibq-scale submit ar/xl data.train=s3://bucket/codes out=/shared/xl --nodes 4 --time 24:00:00",
    )
    parser.add_argument("source", metavar="PRESET_OR_YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--cluster", metavar="NAME", help="profile (default: the file's 'default')")
    for name, kind, metavar, about in SETTINGS:
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=about or None)
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other of sbatch, as reservation=x; repeat"
    )
    parser.add_argument(
        "--chain", type=int, default=1, metavar="N", help="N jobs, each goes on where the one before it stopped"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, print the sbatch file, and submit nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_submit)


def _submit(args: argparse.Namespace) -> int:
    from ibq_scale.cluster import snapshot
    from ibq_scale.cluster.checks import Submission, run_checks
    from ibq_scale.cluster.submit import render, submit

    request, cluster = _request(args)
    preview = snapshot.Snapshot(snapshot.next_folder(request.run_dir), snapshot.Source.here())
    script = render(request, preview)
    checks = []
    for check in run_checks(Submission(request.config, script, request.profile.gpu, queue=not args.dry_run)):
        checks.append(check)
        _say(f"{check.level:<4}  {check.name:<9}  {check.text}")
    failed = [check.name for check in checks if check.level == "FAIL"]
    if args.dry_run or failed:
        if args.json:
            print(json.dumps(_document(request, checks, [], None) | {"script": script.text}))
        elif args.dry_run:
            print(script.text, end="")
        if failed:
            raise UserError(f"not submitted: mend {', '.join(failed)} (FAIL, above)")
        return 0
    snapped, jobs = submit(request, chain=args.chain, cluster=cluster)
    if args.json:
        print(json.dumps(_document(request, checks, jobs, str(snapped.folder))))
        return 0
    print(f"submitted {', '.join(jobs)}: {request.run_dir}")
    print(f"  runs {snapped.source}, {snapped.folder}")
    print(f"  tail -F {request.log.replace('%j', jobs[0])}")
    print(f"  ibq-scale jobs {request.run_dir}")
    print(f"  ibq-scale cancel {request.run_dir}     # saves first")
    return 0


def _request(args: argparse.Namespace) -> tuple[Request, str | None]:
    from ibq_scale.cluster.profile import load_profile
    from ibq_scale.cluster.submit import make_request
    from ibq_scale.config.layers import require_complete, resolve

    at_least_one(args, "nodes", "chain", "ntasks_per_node", "cpus_per_task")
    if args.gpus_per_node is not None and args.gpus_per_node < 0:
        raise UserError(f"--gpus-per-node must be at least 0, got {args.gpus_per_node}")
    config = resolve(args.source, args.overrides).config
    require_complete(config)
    cluster, profile = load_profile(args.cluster)
    names = [name.replace("-", "_") for name, *_ in SETTINGS]
    flags = {name: getattr(args, name) for name in names}
    return make_request(config, args.nodes, profile, flags, args.sbatch), cluster


def _document(request: Request, checks: list[Check], jobs: list[str], folder: str | None) -> dict[str, object]:
    return {
        "run": str(request.run_dir),
        "jobs": jobs,
        "submitted": folder,
        "logs": [request.log.replace("%j", job) for job in jobs],
        "checks": [asdict(check) for check in checks],
    }


def _say(line: str) -> None:
    # Not in the way of what a script reads: the sbatch file, a JSON document.
    print(line, file=sys.stderr, flush=True)
