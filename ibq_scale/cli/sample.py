"""``ibq-scale sample``: images by class from a transformer and its tokenizer."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ibq_scale.cli.options import add_ranks, at_least_one, finite
from ibq_scale.cli.tokenize import parse_part
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.config.models import TransformerConfig
    from ibq_scale.models.sampling import SamplingSettings


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "sample",
        help="images by class: PNG grid and .npz",
        description="Sample images. The same job gives the same bytes on any number of ranks, and goes on where it was "
        "stopped when it is run again. Image i of a class is a function of the seed, the class and i.",
        epilog="example: ibq-scale sample runs/xl --tokenizer runs/tok --to samples --per-class 50 --published",
    )
    parser.add_argument("checkpoint", metavar="AR_CKPT", help="run directory, checkpoint or exported model")
    parser.add_argument("--tokenizer", required=True, metavar="CKPT", help="the tokenizer of its codes")
    parser.add_argument("--to", required=True, type=Path, metavar="DIR")
    parser.add_argument("--classes", metavar="LIST", help="labels, for example 0,7,20-29 (default: all)")
    parser.add_argument(
        "--captions", type=Path, metavar="FILE", help="one caption a line, for a model with conditioning=embedding"
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a caption; may be given again")
    parser.add_argument("--per-class", type=int, default=8, metavar="N", help="images a class or caption (default 8)")
    parser.add_argument("--guidance", type=finite, help="1 is none (default)")
    parser.add_argument(
        "--guidance-schedule",
        choices=("constant", "linear", "power-cosine"),
        default="constant",
        help="linear (MAR) and power-cosine (RAR) rise over the codes from none to --guidance",
    )
    parser.add_argument("--guidance-power", type=finite, default=1.0, metavar="P", help="of power-cosine (default 1)")
    parser.add_argument("--temperature", type=finite, help="default 1")
    parser.add_argument(
        "--published",
        action="store_true",
        help="the published guidance and temperature of the model's size, if not given: "
        "b 2.25, 1.10; l 2.0, 1.0; xl 2.35, 1.15; xxl 2.85, 1.20 (FID there: --per-class 50)",
    )
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps every code (default)")
    parser.add_argument("--top-p", type=finite, default=1.0, help="1 keeps every code (default)")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest code")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images at once on a rank (default 32)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the transformer (default fp32)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="give the transformer's blocks to torch.compile (for GPUs, long jobs)"
    )
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="only every N-th batch from I on: for an array of jobs"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_ranks(parser)
    parser.set_defaults(run=_sample, check=_check)


def parse_classes(text: str) -> list[int]:
    """``0,7,20-29`` → labels. UserError if unreadable."""
    labels: list[int] = []
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--classes {text}: cannot read '{item}': write labels like 0,7,20-29")
        labels.extend(range(int(first), int(last if dash else first) + 1))
    return labels


def _captions(args: argparse.Namespace) -> list[str]:
    """The asked captions. UserError for an unreadable file, or for classes beside them."""
    captions = list(args.prompt or [])
    if args.captions is not None:
        try:
            captions += [
                line.strip() for line in args.captions.read_text(encoding="utf-8").splitlines() if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--captions {args.captions}: {e}: give a text file with one caption a line") from None
        if not captions:
            raise UserError(f"--captions {args.captions} holds no caption: write one a line")
    if captions and args.classes is not None:
        raise UserError("--classes is for class-conditional models, --captions and --prompt for others: give one")
    return captions


def _check(args: argparse.Namespace) -> None:
    at_least_one(args, "batch", "per_class")
    _captions(args)
    wrong_temperature = args.temperature is not None and args.temperature <= 0
    if wrong_temperature or args.top_k < 0 or not 0 < args.top_p <= 1:
        raise UserError("--temperature must be above 0, --top-k at least 0 and --top-p above 0 and at most 1")
    if args.guidance_power <= 0:
        raise UserError(f"--guidance-power must be above 0, got {args.guidance_power}")
    parse_part(args.part)
    if args.classes is not None:
        parse_classes(args.classes)


def _settings(args: argparse.Namespace, config: TransformerConfig) -> SamplingSettings:
    from ibq_scale.generate.published import published_sampling
    from ibq_scale.models.sampling import SamplingSettings

    guidance, temperature = published_sampling(config) if args.published else (1.0, 1.0)
    return SamplingSettings(
        guidance if args.guidance is None else args.guidance,
        temperature if args.temperature is None else args.temperature,
        args.top_k,
        args.top_p,
        args.greedy,
        args.seed,
        args.guidance_schedule,
        args.guidance_power,
    )


def _sample(args: argparse.Namespace) -> int:
    import torch

    from ibq_scale.distributed.environment import join
    from ibq_scale.generate.images import sample
    from ibq_scale.outputs import GRID, SAMPLES
    from ibq_scale.pretrained.loading import load_ar, load_tokenizer

    _check(args)
    part = parse_part(args.part)
    with join() as world:
        ar = load_ar(args.checkpoint, world.device)
        settings = _settings(args, ar.config)
        if args.precision == "bf16":
            ar.to(torch.bfloat16)
        if args.compile:
            ar.transformer.compile_regions()
        tokenizer = load_tokenizer(args.tokenizer, world.device)
        captions = _captions(args)
        classes = parse_classes(args.classes) if args.classes else list(range(len(captions) or ar.config.classes))
        how = {"batch": args.batch, "part": part, "captions": captions}
        report = sample(ar, tokenizer, classes, args.per_class, settings, args.to, world, **how)
        if not world.is_main:
            return 0
    if args.json:
        print(json.dumps(asdict(report)))
        return 0
    reused = f" ({report.reused_images} from an earlier run)" if report.reused_images else ""
    print(
        f"{report.images} images of {len(report.classes)} {'captions' if captions else 'classes'}{reused}: "
        f"{report.images_per_s:.2f} img/s, {report.tokens_per_s:.0f} tokens/s"
    )
    if report.complete:
        print(f"{args.to / GRID}, {args.to / SAMPLES}")
    else:
        print(f"other parts are missing: the last one to end writes {args.to / SAMPLES}")
    return 0
