"""``ibq-scale sample``: images by class from a transformer and its tokenizer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ibq_scale.cli.options import JSON, RANKS, Checked, Family, argument, finite, flag, real, show, whole
from ibq_scale.cli.tokenize import part
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.config.models import TransformerConfig
    from ibq_scale.generate.images import SampleReport
    from ibq_scale.models.sampling import SamplingSettings
COMMAND = Family()
add_commands = COMMAND.add_commands


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
    _captions(args)
    if args.top_k < 0 or not 0 < args.top_p <= 1:
        raise UserError("--top-k must be at least 0, and --top-p above 0 and at most 1")


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


@COMMAND.command(
    "images by class: PNG grid and .npz",
    "runs/xl --tokenizer runs/tok --to samples --per-class 50 --published",
    argument("checkpoint", metavar="AR_CKPT", help="run directory, checkpoint or exported model"),
    argument("--tokenizer", required=True, metavar="CKPT", help="the tokenizer of its codes"),
    argument("--to", required=True, type=Path, metavar="DIR"),
    argument(
        "--classes",
        action=Checked,
        check=parse_classes,
        metavar="LIST",
        help="labels, for example 0,7,20-29 (default: all)",
    ),
    argument(
        "--captions", type=Path, metavar="FILE", help="one caption a line, for a model with conditioning=embedding"
    ),
    argument("--prompt", action="append", metavar="TEXT", help="a caption; may be given again"),
    whole("--per-class", "images a class or caption", 8),
    argument("--guidance", type=finite, help="1 is none (default)"),
    argument(
        "--guidance-schedule",
        choices=("constant", "linear", "power-cosine"),
        default="constant",
        help="linear (MAR) and power-cosine (RAR) rise over the codes from none to --guidance",
    ),
    real("--guidance-power", "of power-cosine", 1.0, above=0, metavar="P"),
    real("--temperature", "default 1", above=0),
    flag(
        "--published",
        "the published guidance and temperature of the model's size, if not given: "
        "b 2.25, 1.10; l 2.0, 1.0; xl 2.35, 1.15; xxl 2.85, 1.20 (FID there: --per-class 50)",
    ),
    argument("--top-k", type=int, default=0, help="0 keeps every code (default)"),
    argument("--top-p", type=finite, default=1.0, help="1 keeps every code (default)"),
    flag("--greedy", "always the likeliest code"),
    argument("--seed", type=int, default=0),
    whole("--batch", "images at once on a rank", 32),
    argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the transformer (default fp32)"),
    flag("--compile", "give the transformer's blocks to torch.compile (for GPUs, long jobs)"),
    part("only every N-th batch from I on: for an array of jobs"),
    JSON,
    RANKS,
    check=_check,
)
def _sample(args: argparse.Namespace) -> int:
    """Sample images. The same job gives the same bytes on any number of ranks, and goes on where it was stopped when it
    is run again. Image i of a class is a function of the seed, the class and i.
    """
    import torch

    from ibq_scale.distributed.environment import join
    from ibq_scale.generate.images import sample
    from ibq_scale.pretrained.loading import load_ar, load_tokenizer

    _check(args)
    with join() as world:
        ar = load_ar(args.checkpoint, world.device)
        settings = _settings(args, ar.config)
        if args.precision == "bf16":
            ar.to(torch.bfloat16)
        if args.compile:
            ar.transformer.compile_regions()
        tokenizer = load_tokenizer(args.tokenizer, world.device)
        captions = _captions(args)
        classes = args.classes or list(range(len(captions) or ar.config.classes))
        how = {"batch": args.batch, "part": args.part, "captions": captions}
        report = sample(ar, tokenizer, classes, args.per_class, settings, args.to, world, **how)
        return show(args, report, _lines(report, captions)) if world.is_main else 0


def _lines(report: SampleReport, captions: Sequence[str]) -> Iterator[str]:
    from ibq_scale.outputs import GRID, SAMPLES

    reused = f" ({report.reused_images} from an earlier run)" if report.reused_images else ""
    yield (
        f"{report.images} images of {len(report.classes)} {'captions' if captions else 'classes'}{reused}: "
        f"{report.images_per_s:.2f} img/s, {report.tokens_per_s:.0f} tokens/s"
    )
    grid, samples = Path(report.folder) / GRID, Path(report.folder) / SAMPLES
    yield f"{grid}, {samples}" if report.complete else f"other parts are missing: the last one to end writes {samples}"
