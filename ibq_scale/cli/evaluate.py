"""``ibq-scale evaluate``: measures of trained models."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ibq_scale.cli.ranks import add_ranks, at_least_one


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the family to the command line."""
    family = commands.add_parser("evaluate", help="measure a trained model").add_subparsers(
        title="what", metavar="WHAT", required=True
    )
    parser = family.add_parser(
        "reconstruction",
        help="PSNR, SSIM, LPIPS, rFID and codebook usage of a tokenizer",
        description="Reconstruct a data set. The figures do not depend on the number of ranks.",
        epilog="example: ibq-scale evaluate reconstruction runs/tok s3://bucket/imagenet-val --json",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="run directory, checkpoint or exported model")
    parser.add_argument("data", metavar="DATA", help="folder or s3:// prefix that 'prepare images' wrote")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images at once on a rank (default 16)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_ranks(parser)
    parser.set_defaults(run=_reconstruction)


def _reconstruction(args: argparse.Namespace) -> int:
    from ibq_scale.distributed.environment import join
    from ibq_scale.evaluate.reconstruction import evaluate_reconstruction

    at_least_one(args, "batch", "limit")
    with join() as world:
        report = evaluate_reconstruction(args.checkpoint, args.data, world, batch=args.batch, limit=args.limit)
        if not world.is_main:
            return 0
    if args.json:
        print(json.dumps(asdict(report)))
        return 0
    print(f"images       {report.images} of {report.data}, centre crop {report.resolution}")
    print(f"PSNR         {report.psnr:.3f} dB")
    print(f"SSIM         {report.ssim:.4f}")
    for name, value in (("LPIPS", report.lpips), ("rFID", report.rfid)):
        shown = f"{value:.4f}" if value is not None else f"not measured: {report.not_measured[name.lower()]}"
        print(f"{name:<12} {shown}")
    print(f"usage        {100 * report.usage:.2f} % of {report.codebook_size} codes")
    print(f"perplexity   {report.perplexity:.1f}")
    print(f"speed        {report.images_per_s:.1f} img/s")
    return 0
