"""``ibq-scale doctor``: checks of this machine before a run."""

from __future__ import annotations

import argparse
import json

from ibq_scale.cli.options import JSON, Family, argument, whole

WIDTH = 20
COMMAND = Family()
add_commands = COMMAND.add_commands


@COMMAND.command(
    "check this machine: packages, GPUs, kernels, ranks, store, disks, weights, Slurm",
    "--data s3://bucket/imagenet --run-dir /shared/runs",
    argument("--data", metavar="URL", help="a prepared data set: its manifest, and the rate of a shard"),
    argument("--run-dir", metavar="DIR", help="where runs will be: room and rate (default: runs)"),
    whole("--ranks", "of the all-reduce (default: one a GPU, or 2)"),
    JSON,
)
def _doctor(args: argparse.Namespace) -> int:
    """Check what a run needs of this node, each thing within a time limit: ok, warn (may be as you want it) or FAIL,
    and what to do. Exit code 1 where something fails. In a job, checks the node that it runs on.
    """
    import platform
    import time

    from ibq_scale.doctor.run import examine
    from ibq_scale.doctor.tools import Subject

    begin, host = time.perf_counter(), platform.node()
    if not args.json:
        print(f"{host}: {platform.system()} {platform.release()}, Python {platform.python_version()}", flush=True)
    lines = []
    for line in examine(Subject(args.data, args.run_dir, args.ranks)):
        lines.append(line)
        if not args.json:
            print(line.lines(WIDTH), flush=True)
    failed = [line.name for line in lines if line.level == "FAIL"]
    seconds = time.perf_counter() - begin
    if args.json:
        found = [{"state": f.level, "what": f.name, "seen": f.text, "todo": f.todo} for f in lines]
        print(json.dumps({"host": host, "seconds": seconds, "failed": len(failed), "lines": found}, indent=2))
    else:
        warned = sum(line.level == "warn" for line in lines)
        verdict = f"{len(failed)} FAILED ({', '.join(failed)})" if failed else "nothing fails"
        left_out = "" if args.data else "; not looked at: a data set (--data URL)"
        print(f"{verdict}, {warned} warning{'s' * (warned != 1)}, {seconds:.0f} s{left_out}")
    return 1 if failed else 0
