"""``ibq-scale demo``: the whole path in minutes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ibq_scale.cli.options import Family, argument

COMMAND = Family()
add_commands = COMMAND.add_commands


@COMMAND.command(
    "the whole path in minutes, on two CPU ranks and an embedded S3 endpoint",
    "--to runs/demo",
    argument("--to", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo"),
)
def _demo(args: argparse.Namespace) -> int:
    """Photographs → shards in S3 → IBQ tokenizer, VQ baseline → codes → transformer → samples → report."""
    from ibq_scale.console import duration
    from ibq_scale.demo.plan import Plan
    from ibq_scale.demo.run import StageFailedError, run_demo

    try:
        facts = run_demo(args.to, Plan())
    except StageFailedError as e:
        print(f"ibq-scale: {e}", file=sys.stderr)
        return 1
    print(f"codebook usage   IBQ {100 * facts['usage_ibq']:.1f} %, VQ {100 * facts['usage_vq']:.1f} %")
    print(f"held-out PSNR    IBQ {facts['psnr']:.2f} dB, VQ {facts['psnr_vq']:.2f} dB")
    print(f"AR loss          {facts['ar_loss_start']:.3f} → {facts['ar_loss_end']:.3f} nats a code")
    print(f"samples          {100 * facts['samples_recognised']:.0f} % look most like their own class")
    print(f"time             {duration(facts['seconds_total'])} on {facts['world_size']} ranks")
    print(f"report           {args.to / 'report.html'}")
    return 0
