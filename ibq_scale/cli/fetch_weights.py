"""``ibq-scale fetch-weights``: pretrained weights of losses and metrics, before a job needs them."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from ibq_scale.console import gigabytes

NAMES = ("vgg", "alex", "inception", "dino", "dinov2")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "fetch-weights",
        help="get the pretrained weights of losses and metrics, on a node with internet",
        description="Download VGG16 and AlexNet (LPIPS), Inception (FID), DINO (discriminator) and DINOv2 (features) "
        "to $IBQ_SCALE_WEIGHTS or ~/.cache/ibq-scale/weights, verified by their published hashes. DINO has none: "
        "its tensors are checked, and its hash is recorded at the first fetch. Existing files stay.",
        epilog="example: ibq-scale fetch-weights vgg inception",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument(
        "--from", dest="given", type=Path, metavar="PATH", help="take them from a folder or file instead"
    )
    parser.add_argument("--list", action="store_true", help="only list the files and the folder")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> int:
    from ibq_scale.errors import UserError
    from ibq_scale.losses.weights import fetch, status

    names = args.names or NAMES
    for name in names:
        if name not in NAMES:
            raise UserError(f"there are no weights '{name}': choose from {', '.join(NAMES)}")
    found = status(names) if args.list else fetch(names, args.given, _say)
    if args.json:
        print(json.dumps([asdict(f) for f in found]))
        return 0
    for f in found:
        size = gigabytes(f.bytes) if f.bytes else ""
        print(f"{f.name:<10} {f.state:<8} {size:>9}  {f.path}  ({f.needed_for})")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
