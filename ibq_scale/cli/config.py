"""``ibq-scale config``: the resolved config with the origin of each value, and the reference of all keys."""

from __future__ import annotations

import argparse
import json


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the family to the command line."""
    family = commands.add_parser("config", help="show a run's config and the reference of all keys").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    show = family.add_parser(
        "show",
        help="print a preset or file with overrides applied, and where each value comes from",
        epilog="example: ibq-scale config show tokenizer/ibq-16384 train.micro_batch=8",
    )
    show.add_argument("source", metavar="PRESET_OR_YAML")
    show.add_argument("overrides", nargs="*", metavar="key=value")
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
    values = resolved.config.model_dump(mode="json")
    meanings = descriptions(type(resolved.config)) if args.describe else {}
    if args.json:
        shown = {"config": values, "origins": resolved.origins} | ({"meanings": meanings} if meanings else {})
        print(json.dumps(shown, indent=2, ensure_ascii=False))
        return 0
    flat = {key: json.dumps(value, ensure_ascii=False) for key, value in flatten(values).items()}
    wide = max(map(len, flat))
    far = min(40, max(map(len, flat.values())))
    for key, value in flat.items():
        print(f"{key:<{wide}}  {value:<{far}}  {resolved.origins.get(key, 'default')}")
        if meanings.get(key):
            print(f"  # {meanings[key]}")
    return 0


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
