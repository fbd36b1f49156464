"""``ibq-scale checkpoint``: list, check, roll back, export, import."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from ibq_scale.cli.options import JSON, Family, argument, flag, show, whole
from ibq_scale.console import gigabytes

EXPORTS = {
    "safetensors": "ibq_scale.pretrained.exporting:export",
    "published": "ibq_scale.pretrained.published:export_published",
    "huggingface": "ibq_scale.pretrained.published:export_huggingface",
    "transformers": "ibq_scale.pretrained.transformers_layout:export_transformers",
}


RUN = argument("run_dir", type=Path, metavar="RUN")
FAMILY = Family("checkpoint", "list, verify, roll back, export and import checkpoints")
add_commands = FAMILY.add_commands


@FAMILY.command("whole checkpoints of a run", "runs/ibq-16384", RUN, JSON)
def _ls(args: argparse.Namespace) -> int:
    from ibq_scale.checkpoint.reading import whole_checkpoints
    from ibq_scale.errors import UserError

    if not args.run_dir.is_dir():
        raise UserError(f"{args.run_dir} does not exist: give a run directory")
    found = whole_checkpoints(args.run_dir / "checkpoints")
    rows, lines = [], []
    for c in found:
        ranks = c.manifest["world_size"]
        rows.append({"step": c.step, "samples": c.samples, "world_size": ranks, "bytes": c.bytes, "path": str(c.path)})
        size = f"{f'{ranks} ranks':>10}  {gigabytes(c.bytes):>12}"
        lines.append(f"step {c.step:>8}  {c.samples:>12} samples  {size}  {c.path}")
    return show(args, rows, lines or [f"{args.run_dir}: no whole checkpoint"])


@FAMILY.command(
    "hash every file again",
    "runs/tok/checkpoints/step-00001000",
    argument("path", type=Path, metavar="CKPT_OR_RUN", help="a run: its newest whole checkpoint, and all damaged ones"),
)
def _verify(args: argparse.Namespace) -> int:
    from ibq_scale.checkpoint.reading import examine, newest_or_this, verify

    _, damaged = examine(args.path / "checkpoints")
    for line in damaged:
        print(line, file=sys.stderr)
    checkpoint = newest_or_this(args.path)
    faults = verify(checkpoint)
    for fault in faults:
        print(f"{checkpoint.path}: {fault}", file=sys.stderr)
    if not faults:
        print(f"{checkpoint.path}: {len(checkpoint.manifest['files'])} files are as in its manifest")
    return 1 if faults or damaged else 0


@FAMILY.command(
    "set a run back to an earlier checkpoint",
    "runs/tok --to 20000",
    RUN,
    argument("--to", required=True, type=int, metavar="STEP", help="a step that 'checkpoint ls' lists"),
)
def _rollback(args: argparse.Namespace) -> int:
    """Make the checkpoint of a step the run's newest. Later ones, and the lines of metrics.jsonl, are kept in
    RUN/rolled-back. Refused while the run is alive.
    """
    from ibq_scale.supervise.rollback import rollback

    for line in rollback(args.run_dir, args.to):
        print(line)
    return 0


@FAMILY.command(
    "the model alone, as safetensors with a config, or in the published code's layout",
    "runs/tok --to models/tok",
    argument("path", type=Path, metavar="CKPT_OR_RUN"),
    argument("--to", required=True, type=Path, metavar="PATH", help="new folder, or new file if published"),
    argument(
        "--layout",
        "--format",
        choices=(*EXPORTS, "deepspeed"),
        default="safetensors",
        help="safetensors and config in a folder (default); one .ckpt file for the published code; a tokenizer's "
        "config.json and safetensors in the layout of BAAI/Emu3.5-VisionTokenizer; a transformer for Hugging Face "
        "transformers, with its code; or a checkpoint's live weights, a folder per engine, for zero_to_fp32",
    ),
)
def _export(args: argparse.Namespace) -> int:
    if args.layout in EXPORTS:
        module, _, name = EXPORTS[args.layout].partition(":")
        kind = getattr(importlib.import_module(module), name)(args.path, args.to)
        print(f"{args.to}: {kind}")
        return 0
    from ibq_scale.checkpoint.reading import newest_or_this
    from ibq_scale.pretrained.loading import refuse_overwrite
    from ibq_scale.zero.export import export_deepspeed

    refuse_overwrite(args.to)
    for folder in export_deepspeed(newest_or_this(args.path), args.to):
        print(f"{folder}: for zero_to_fp32")
    return 0


@FAMILY.command(
    "a checkpoint of the published code, or a folder like Emu3.5's tokenizer → a model of ours",
    "IBQ_16384.ckpt --to models/ibq-16384 --ema",
    argument("file", type=Path, metavar="FILE"),
    argument("--to", required=True, type=Path, metavar="DIR"),
    flag("--ema", "a tokenizer's averaged weights"),
    whole("--heads", "an AR model's heads (default: width / 64)"),
    whole("--tokens", "its codes an image (default 256)"),
)
def _import(args: argparse.Namespace) -> int:
    from ibq_scale.pretrained.exporting import save_model
    from ibq_scale.pretrained.loading import refuse_overwrite
    from ibq_scale.pretrained.published import import_published

    refuse_overwrite(args.to)
    imported = import_published(args.file, ema=args.ema, heads=args.heads, tokens=args.tokens)
    save_model(args.to, imported.model, {"imported_from": args.file.name, "ema": args.ema})
    left = ", ".join(f"{name} ({count} tensors)" if count else name for name, count in imported.left_aside.items())
    print(f"{args.to}: imported; " + (f"left aside: {left}" if left else "every tensor used"))
    for note in imported.notes:
        print(note)
    if "model_ema" in imported.left_aside and not args.ema:
        print("these are the live weights; the published figures are of the averaged ones (--ema)")
    return 0


@FAMILY.command(
    "an exported model to the Hugging Face Hub",
    "models/tok me/ibq-16384",
    argument("folder", type=Path, metavar="DIR"),
    argument("repo", metavar="OWNER/NAME"),
    flag("--private", "if the repository is new"),
)
def _push(args: argparse.Namespace) -> int:
    """Upload an exported model. ibq_scale.load_tokenizer('hf://OWNER/NAME') loads it anywhere."""
    from ibq_scale.pretrained.hub import push

    print(push(args.folder, args.repo, private=args.private))
    return 0
