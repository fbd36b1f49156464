"""``ibq-scale checkpoint``: list, check, roll back, export, import."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ibq_scale.console import gigabytes


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the family to the command line."""
    family = commands.add_parser(
        "checkpoint", help="list, verify, roll back, export and import checkpoints"
    ).add_subparsers(title="commands", metavar="COMMAND", required=True)
    ls = family.add_parser(
        "ls", help="whole checkpoints of a run", epilog="example: ibq-scale checkpoint ls runs/ibq-16384"
    )
    ls.add_argument("run_dir", type=Path, metavar="RUN")
    ls.add_argument("--json", action="store_true", help="print one JSON document")
    ls.set_defaults(run=_ls)
    verify = family.add_parser(
        "verify",
        help="hash every file again",
        epilog="example: ibq-scale checkpoint verify runs/tok/checkpoints/step-00001000",
    )
    verify.add_argument(
        "path", type=Path, metavar="CKPT_OR_RUN", help="a run: its newest whole checkpoint, and all damaged ones"
    )
    verify.set_defaults(run=_verify)
    rollback = family.add_parser(
        "rollback",
        help="set a run back to an earlier checkpoint",
        description="Make the checkpoint of a step the run's newest. Later ones, and the lines of metrics.jsonl, are "
        "kept in RUN/rolled-back. Refused while the run is alive.",
        epilog="example: ibq-scale checkpoint rollback runs/tok --to 20000",
    )
    rollback.add_argument("run_dir", type=Path, metavar="RUN")
    rollback.add_argument("--to", required=True, type=int, metavar="STEP", help="a step that 'checkpoint ls' lists")
    rollback.set_defaults(run=_rollback)
    export = family.add_parser(
        "export",
        help="the model alone, as safetensors with a config, or in the published code's layout",
        epilog="example: ibq-scale checkpoint export runs/tok --to models/tok",
    )
    export.add_argument("path", type=Path, metavar="CKPT_OR_RUN")
    export.add_argument("--to", required=True, type=Path, metavar="PATH", help="new folder, or new file if published")
    export.add_argument(
        "--layout",
        "--format",
        choices=("safetensors", "published", "huggingface", "transformers", "deepspeed"),
        default="safetensors",
        help="safetensors and config in a folder (default); one .ckpt file for the published code; a tokenizer's "
        "config.json and safetensors in the layout of BAAI/Emu3.5-VisionTokenizer; a transformer for Hugging Face "
        "transformers, with its code; or a checkpoint's live weights, a folder per engine, for zero_to_fp32",
    )
    export.set_defaults(run=_export)
    imported = family.add_parser(
        "import",
        help="a checkpoint of the published code, or a folder like Emu3.5's tokenizer → a model of ours",
        epilog="example: ibq-scale checkpoint import IBQ_16384.ckpt --to models/ibq-16384 --ema",
    )
    imported.add_argument("file", type=Path, metavar="FILE")
    imported.add_argument("--to", required=True, type=Path, metavar="DIR")
    imported.add_argument("--ema", action="store_true", help="a tokenizer's averaged weights")
    imported.add_argument("--heads", type=int, metavar="N", help="an AR model's heads (default: width / 64)")
    imported.add_argument("--tokens", type=int, metavar="N", help="its codes an image (default 256)")
    imported.set_defaults(run=_import)
    push = family.add_parser(
        "push",
        help="an exported model to the Hugging Face Hub",
        description="Upload an exported model. ibq_scale.load_tokenizer('hf://OWNER/NAME') loads it anywhere.",
        epilog="example: ibq-scale checkpoint push models/tok me/ibq-16384",
    )
    push.add_argument("folder", type=Path, metavar="DIR")
    push.add_argument("repo", metavar="OWNER/NAME")
    push.add_argument("--private", action="store_true", help="if the repository is new")
    push.set_defaults(run=_push)


def _ls(args: argparse.Namespace) -> int:
    from ibq_scale.checkpoint.reading import whole_checkpoints
    from ibq_scale.errors import UserError

    if not args.run_dir.is_dir():
        raise UserError(f"{args.run_dir} does not exist: give a run directory")
    found = whole_checkpoints(args.run_dir / "checkpoints")
    rows = [
        {
            "step": c.step,
            "samples": c.samples,
            "world_size": c.manifest["world_size"],
            "bytes": c.bytes,
            "path": str(c.path),
        }
        for c in found
    ]
    if args.json:
        print(json.dumps(rows))
        return 0
    if not rows:
        print(f"{args.run_dir}: no whole checkpoint")
    for row in rows:
        size, ranks = gigabytes(row["bytes"]), f"{row['world_size']} ranks"
        print(f"step {row['step']:>8}  {row['samples']:>12} samples  {ranks:>10}  {size:>12}  {row['path']}")
    return 0


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


def _rollback(args: argparse.Namespace) -> int:
    from ibq_scale.supervise.rollback import rollback

    for line in rollback(args.run_dir, args.to):
        print(line)
    return 0


def _export(args: argparse.Namespace) -> int:
    if args.layout == "published":
        from ibq_scale.pretrained.published import export_published

        kind = export_published(args.path, args.to)
    elif args.layout == "huggingface":
        from ibq_scale.pretrained.published import export_huggingface

        kind = export_huggingface(args.path, args.to)
    elif args.layout == "transformers":
        from ibq_scale.pretrained.transformers_layout import export_transformers

        kind = export_transformers(args.path, args.to)
    elif args.layout == "deepspeed":
        from ibq_scale.checkpoint.reading import newest_or_this
        from ibq_scale.pretrained.loading import refuse_overwrite
        from ibq_scale.zero.export import export_deepspeed

        refuse_overwrite(args.to)
        for folder in export_deepspeed(newest_or_this(args.path), args.to):
            print(f"{folder}: for zero_to_fp32")
        return 0
    else:
        from ibq_scale.pretrained.exporting import export

        kind = export(args.path, args.to)
    print(f"{args.to}: {kind}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from ibq_scale.cli.options import at_least_one
    from ibq_scale.pretrained.exporting import save_model
    from ibq_scale.pretrained.loading import refuse_overwrite
    from ibq_scale.pretrained.published import import_published

    at_least_one(args, "heads", "tokens")
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


def _push(args: argparse.Namespace) -> int:
    from ibq_scale.pretrained.hub import push

    print(push(args.folder, args.repo, private=args.private))
    return 0
