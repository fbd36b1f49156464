"""``ibq-scale fetch-weights``: pretrained weights of losses and metrics, before a job needs them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ibq_scale.cli.options import JSON, Family, argument, flag, show
from ibq_scale.console import gigabytes, tell

NAMES = ("vgg", "alex", "inception", "dino", "dinov2")
COMMAND = Family()
add_commands = COMMAND.add_commands


@COMMAND.command(
    "get the pretrained weights of losses and metrics, on a node with internet",
    "vgg inception",
    argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)"),
    argument("--from", dest="given", type=Path, metavar="PATH", help="take them from a folder or file instead"),
    flag("--list", "only list the files and the folder"),
    JSON,
)
def _fetch_weights(args: argparse.Namespace) -> int:
    """Download VGG16 and AlexNet (LPIPS), Inception (FID), DINO (discriminator) and DINOv2 (features) to
    $IBQ_SCALE_WEIGHTS or ~/.cache/ibq-scale/weights, verified by their published hashes. DINO has none: its tensors are
    checked, and its hash is recorded at the first fetch. Existing files stay.
    """
    from ibq_scale.errors import UserError
    from ibq_scale.losses.weights import fetch, status

    names = args.names or NAMES
    for name in names:
        if name not in NAMES:
            raise UserError(f"there are no weights '{name}': choose from {', '.join(NAMES)}")
    found = status(names) if args.list else fetch(names, args.given, tell)
    lines = (
        f"{f.name:<10} {f.state:<8} {gigabytes(f.bytes) if f.bytes else '':>9}  {f.path}  ({f.needed_for})"
        for f in found
    )
    return show(args, found, lines)
