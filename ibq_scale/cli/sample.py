"""``ibq-scale sample``: images by class from a transformer and its tokenizer."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ibq_scale.cli.ranks import add_ranks, at_least_one
from ibq_scale.errors import UserError


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "sample",
        help="images by class: PNG grid and .npz",
        description="Sample images. The same seed gives the same images on any number of ranks.",
        epilog="example: ibq-scale sample runs/xl --tokenizer runs/tok --to samples --guidance 2.35 --per-class 50",
    )
    parser.add_argument("checkpoint", metavar="AR_CKPT", help="run directory, checkpoint or exported model")
    parser.add_argument("--tokenizer", required=True, metavar="CKPT", help="the tokenizer that wrote its codes")
    parser.add_argument("--to", required=True, type=Path, metavar="DIR")
    parser.add_argument("--classes", metavar="LIST", help="labels, for example 0,7,20-29 (default: all)")
    parser.add_argument("--per-class", type=int, default=8, metavar="N", help="images a class (default 8)")
    parser.add_argument("--guidance", type=float, default=1.0, help="1 is none (default)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps every code (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 keeps every code (default)")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest code")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images at once on a rank (default 32)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_ranks(parser)
    parser.set_defaults(run=_sample, check=_check)


def parse_classes(text: str) -> list[int]:
    """``0,7,20-29`` → labels. UserError where it cannot be read."""
    labels: list[int] = []
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--classes {text}: cannot read '{item}': write labels like 0,7,20-29")
        labels.extend(range(int(first), int(last if dash else first) + 1))
    return labels


def _check(args: argparse.Namespace) -> None:
    at_least_one(args, "batch", "per_class")
    if args.temperature <= 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
        raise UserError("--temperature must be above 0, --top-k at least 0 and --top-p above 0 and at most 1")
    if args.classes is not None:
        parse_classes(args.classes)


def _sample(args: argparse.Namespace) -> int:
    from ibq_scale.distributed.environment import join
    from ibq_scale.generate.images import GRID, SAMPLES, sample
    from ibq_scale.models.sampling import SamplingSettings
    from ibq_scale.pretrained.loading import load_ar, load_tokenizer

    _check(args)
    settings = SamplingSettings(args.guidance, args.temperature, args.top_k, args.top_p, args.greedy, args.seed)
    with join() as world:
        ar = load_ar(args.checkpoint, world.device)
        tokenizer = load_tokenizer(args.tokenizer, world.device)
        classes = parse_classes(args.classes) if args.classes else list(range(ar.config.classes))
        report = sample(ar, tokenizer, classes, args.per_class, settings, args.to, world, batch=args.batch)
        if not world.is_main:
            return 0
    if args.json:
        print(json.dumps(asdict(report)))
        return 0
    print(
        f"{report.images} images of {len(report.classes)} classes: {args.to / GRID}, {args.to / SAMPLES} "
        f"({report.images_per_s:.2f} img/s, {report.tokens_per_s:.0f} tokens/s)"
    )
    return 0
