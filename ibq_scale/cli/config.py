"""``ibq-scale config``: the resolved config with the origin of each value, and the reference of all keys."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ibq_scale.cli.options import OVERRIDES, Family, argument, flag, real, whole
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.config.run import AnyRun
FAMILY = Family("config", "show a run's config and the reference of all keys")
add_commands = FAMILY.add_commands


@FAMILY.command(
    "print a preset or file with overrides applied, and where each value comes from",
    "tokenizer/ibq-16384 --gpus 8 --nodes 8 --device h100",
    argument("source", metavar="PRESET_OR_YAML"),
    OVERRIDES,
    whole("--gpus", "GPUs a node"),
    whole("--nodes", default=1),
    argument("--device", metavar="GPU", help="a100, h100, l40s …"),
    real("--memory", "memory of one GPU (10⁹ bytes), instead of its own", above=0, metavar="GB"),
    flag("--describe", "each key's meaning under its value"),
    flag("--json", "one JSON document: config and origins"),
)
def _show(args: argparse.Namespace) -> int:
    """Print a run's config. With --gpus, --device or --memory, settings that are auto get the values that a run takes
    on these GPUs.
    """
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

    if args.memory is None and args.device is not None and named(args.device) is None:
        raise UserError(f"--device {args.device} is not in the table of GPUs: give its --memory in GB")
    memory = args.memory * 1e9 if args.memory else None
    machine = Machine(args.gpus or 1, args.nodes, args.device, memory, profile=read_profile(args.device))
    config, choices = settle(config, machine)
    return config, {choice.key: f"auto: {choice.reason}" for choice in choices}


@FAMILY.command("list the presets", "")
def _presets(args: argparse.Namespace) -> int:
    from ibq_scale.config.layers import preset_names

    print("\n".join(preset_names()))
    return 0


@FAMILY.command(
    "print the JSON Schema of config files, for editors",
    "ar > ar.schema.json",
    argument("task", choices=("tokenizer", "ar")),
)
def _schema(args: argparse.Namespace) -> int:
    from ibq_scale.config.reference import json_schema

    print(json.dumps(json_schema(args.task), indent=2, ensure_ascii=False))
    return 0


@FAMILY.command("print every key with its meaning, type and default, as Markdown", "> docs/configuration.md")
def _reference(args: argparse.Namespace) -> int:
    from ibq_scale.config.reference import markdown

    print(markdown(), end="")
    return 0
