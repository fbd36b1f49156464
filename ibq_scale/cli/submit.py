"""``ibq-scale submit``: checks a run and puts it into Slurm's queue."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ibq_scale.cli.options import JSON, Family, argument, flag, show, whole
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ibq_scale.cluster.render import Script
    from ibq_scale.cluster.snapshot import Snapshot
    from ibq_scale.cluster.submit import Request
    from ibq_scale.findings import Finding

# Accepted in place of a preset. The words behind are the command's own.
COMMANDS = ("tokenize", "sample", "evaluate")

# Flags with a setting of the same name in a cluster's profile.
SETTINGS = (
    argument("--partition", metavar="NAME"),
    argument("--account", metavar="NAME"),
    argument("--qos", metavar="NAME"),
    argument("--constraint", metavar="LIST", help="required features of nodes"),
    argument("--time", metavar="LIMIT", help="HH:MM:SS or DAYS-HH:MM:SS"),
    argument("--mem", metavar="SIZE", help="of a node; 0: all of it"),
    argument("--gpu", metavar="GPU", help="h100, a100-40gb …: to check the memory"),
    whole("--gpus-per-node", "0: ranks on CPUs", least=0),
    whole("--ntasks-per-node", "ranks (default: one a GPU)"),
    whole("--cpus-per-task"),
)
QUEUE = (
    whole("--nodes", "of each job", required=True),
    argument("--cluster", metavar="NAME", help="profile (default: the file's 'default')"),
    *SETTINGS,
    argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, as reservation=x; repeat",
    ),
)
COMMAND = Family()
add_commands = COMMAND.add_commands


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The values of `SETTINGS` by the profile's names, None if not given."""
    keys = [flags[0].removeprefix("--").replace("-", "_") for flags, _ in SETTINGS]
    return {key: getattr(args, key) for key in keys}


@COMMAND.command(
    "check a run and submit it to Slurm",
    "ar/xl data.train=s3://bucket/codes out=/shared/xl --nodes 4 --time 24:00:00",
    argument("source", metavar="PRESET_OR_YAML", help="or tokenize, sample, evaluate"),
    argument("overrides", nargs="*", metavar="key=value", help="or that command's own words"),
    *QUEUE,
    whole("--array", "jobs to share the work of tokenize or sample"),
    whole("--chain", "N jobs, each resumes from the one before", 1),
    flag("--dry-run", "check, print the sbatch file, and submit nothing"),
    JSON,
)
def _submit(args: argparse.Namespace) -> int:
    """Check a run, copy code and config to RUN/submitted, fill slurm/train_*.sbatch and submit it. Flags win over the
    cluster's profile (~/.config/ibq-scale/clusters.yaml), that over the file's own lines. The same for another command,
    behind --: submit --nodes 1 --array 16 -- sample runs/xl --to samples …
    """
    from ibq_scale.cluster.submit import next_snapshot, render, submit

    request, cluster, command = _request(args)
    script = render(request, next_snapshot(request))
    checks = []
    for check in _checks(args, request, script, command):
        checks.append(check)
        # Standard output is for the script or the JSON document.
        print(check.lines(9), file=sys.stderr, flush=True)
    failed = [check.name for check in checks if check.level == "FAIL"]
    if args.dry_run or failed:
        if args.json:
            print(json.dumps(_document(request, checks, [], None) | {"script": script.text}))
        elif args.dry_run:
            print(script.text, end="")
        if failed:
            raise UserError(f"not submitted: fix {', '.join(failed)} (FAIL, above)")
        return 0
    snapped, jobs = submit(request, chain=args.chain, cluster=cluster)
    folder = None if snapped is None else str(snapped.folder)
    return show(args, _document(request, checks, jobs, folder), _lines(request, snapped, jobs))


def _lines(request: Request, snapped: Snapshot | None, jobs: list[str]) -> Iterator[str]:
    from ibq_scale.cluster.snapshot import Source

    work = request.work
    yield f"submitted {', '.join(jobs)}: {work.folder or work.name}"
    if snapped is not None:
        yield f"  runs {snapped.source}, {snapped.folder}"
    else:
        yield f"  runs {Source.here()}, as of its start: the output is no folder for a copy"
    yield f"  tail -F {shlex.quote(str(_log(request, jobs[0])))}"
    if work.config is not None:
        folder = shlex.quote(str(work.folder))
        yield f"  ibq-scale jobs {folder}"
        yield f"  ibq-scale cancel {folder}     # saves first"
    else:
        yield f"  squeue --jobs={','.join(jobs)}"
        yield f"  scancel {' '.join(jobs)}     # the same command resumes"


def _log(request: Request, job: str) -> str:
    return request.log.replace("%j", job).replace("%A", job).replace("%a", "0")


def _checks(
    args: argparse.Namespace, request: Request, script: Script, command: argparse.Namespace | None
) -> Iterator[Finding]:
    from ibq_scale.cluster import checks, command_checks

    queue, config = not args.dry_run, request.work.config
    if config is not None:
        job = checks.Submission(script, config, request.profile.gpu, queue=queue)
        return checks.run_checks(job, checks.CHECKS)
    assert command is not None
    other = command_checks.CommandJob(script, request.work.name, command, queue=queue)
    return checks.run_checks(other, command_checks.CHECKS)


def _request(args: argparse.Namespace) -> tuple[Request, str | None, argparse.Namespace | None]:
    """The request, the cluster's name, and the arguments of a command other than training."""
    from ibq_scale.cluster.profile import load_profile
    from ibq_scale.cluster.submit import make_request, other_command, training
    from ibq_scale.config.layers import require_complete, resolve

    command = None
    if args.source in COMMANDS:
        command = _parse(args.source, args.overrides)
        to = getattr(command, "to", None)
        work = other_command(args.source, args.overrides, None if to is None else str(to), args.array)
    elif args.array is not None:
        raise UserError("--array is for tokenize and sample: a run takes more nodes")
    else:
        config = resolve(args.source, args.overrides).config
        require_complete(config)
        work = training(config)
    cluster, profile = load_profile(args.cluster)
    return make_request(work, args.nodes, profile, settings_of(args), args.sbatch), cluster, command


def _parse(name: str, words: list[str]) -> argparse.Namespace:
    """Parses the words as the command itself does. Its errors end the program."""
    from ibq_scale.cli.main import build_parser

    command = build_parser().parse_args([name, *words])
    if hasattr(command, "check"):
        command.check(command)
    return command


def _document(request: Request, checks: list[Finding], jobs: list[str], folder: str | None) -> dict[str, object]:
    return {
        "run": None if request.work.folder is None else str(request.work.folder),
        "jobs": jobs,
        "submitted": folder,
        "logs": [_log(request, job) for job in jobs],
        "checks": [asdict(check) for check in checks],
    }
