"""``ibq-scale config``: the resolved config with the origin of each value, and the reference of all keys."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ibq_scale.cli.options import at_least_one, finite
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.config.run import AnyRun


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the family to the command line."""
    family = commands.add_parser("config", help="show a run's config and the reference of all keys").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    show = family.add_parser(
        "show",
        help="print a preset or file with overrides applied, and where each value comes from",
        description="Print a run's config. With --gpus, --device or --memory, settings that are auto get the values "
        "that a run takes on these GPUs.",
        epilog="example: ibq-scale config show tokenizer/ibq-16384 --gpus 8 --nodes 8 --device h100",
    )
    show.add_argument("source", metavar="PRESET_OR_YAML")
    show.add_argument("overrides", nargs="*", metavar="key=value")
    show.add_argument("--gpus", type=int, metavar="N", help="GPUs a node")
    show.add_argument("--nodes", type=int, default=1, metavar="N", help="default 1")
    show.add_argument("--device", metavar="GPU", help="a100, h100, l40s …")
    show.add_argument("--memory", type=finite, metavar="GB", help="memory of one GPU (10⁹ bytes), instead of its own")
    show.add_argument("--describe", action="store_true", help="each key's meaning under its value")
    show.add_argument("--json", action="store_true", help="one JSON document: config and origins")
    show.set_defaults(run=_show)
    presets = family.add_parser("presets", help="list the presets", epilog="example: ibq-scale config presets")
    presets.set_defaults(run=_presets)
    schema = family.add_parser(
        "schema",
        help="print the JSON Schema of config files, for editors",
        epilog="example: ibq-scale config schema ar > ar.schema.json",
    )
    schema.add_argument("task", choices=("tokenizer", "ar"))
    schema.set_defaults(run=_schema)
    reference = family.add_parser(
        "reference",
        help="print every key with its meaning, type and default, as Markdown",
        epilog="example: ibq-scale config reference > docs/configuration.md",
    )
    reference.set_defaults(run=_reference)


def _show(args: argparse.Namespace) -> int:
    from ibq_scale.config.layers import flatten, resolve
    from ibq_scale.config.reference import descriptions

    resolved = resolve(args.source, args.overrides)
    config, origins = resolved.config, dict(resolved.origins)
    if args.gpus is not None or args.device is not None or args.memory is not None:
        config, chosen = _settled(config, args)
        origins |= chosen
    values = config.model_dump(mode="json")
    meanings = descriptions(type(config)) if args.describe else {}
    if args.json:
        shown = {"config": values, "origins": origins} | ({"meanings": meanings} if meanings else {})
        print(json.dumps(shown, indent=2, ensure_ascii=False))
        return 0
    flat = {key: json.dumps(value, ensure_ascii=False) for key, value in flatten(values).items()}
    wide = max(map(len, flat))
    far = min(40, max(map(len, flat.values())))
    for key, value in flat.items():
        print(f"{key:<{wide}}  {value:<{far}}  {origins.get(key, 'default')}")
        if meanings.get(key):
            print(f"  # {meanings[key]}")
    return 0


def _settled(config: AnyRun, args: argparse.Namespace) -> tuple[AnyRun, dict[str, str]]:
    """The config as a run on these GPUs has it, and the origins of what is chosen."""
    from ibq_scale.scaling.auto import settle
    from ibq_scale.scaling.devices import named
    from ibq_scale.scaling.plan import Machine
    from ibq_scale.scaling.profile import read_profile

    args.gpus = args.gpus or 1
    at_least_one(args, "gpus", "nodes")
    if args.memory is None and args.device is not None and named(args.device) is None:
        raise UserError(f"--device {args.device} is not in the table of GPUs: give its --memory in GB")
    memory = args.memory * 1e9 if args.memory else None
    machine = Machine(args.gpus, args.nodes, args.device, memory, profile=read_profile(args.device))
    config, choices = settle(config, machine)
    return config, {choice.key: f"auto: {choice.reason}" for choice in choices}


def _presets(args: argparse.Namespace) -> int:
    from ibq_scale.config.layers import preset_names

    print("\n".join(preset_names()))
    return 0


def _schema(args: argparse.Namespace) -> int:
    from ibq_scale.config.reference import json_schema

    print(json.dumps(json_schema(args.task), indent=2, ensure_ascii=False))
    return 0


def _reference(args: argparse.Namespace) -> int:
    from ibq_scale.config.reference import markdown

    print(markdown(), end="")
    return 0
