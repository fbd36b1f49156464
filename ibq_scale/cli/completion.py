"""``ibq-scale completion``: the words of a command line, completed by the shell (argcomplete does the talking)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh", "fish")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "completion",
        help="what a shell needs to complete commands, presets and keys",
        description='Put eval "$(ibq-scale completion bash)" into ~/.bashrc, or zsh\'s into ~/.zshrc; for fish: '
        "ibq-scale completion fish > ~/.config/fish/completions/ibq-scale.fish",
        epilog="example: ibq-scale completion fish > ~/.config/fish/completions/ibq-scale.fish",
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=_completion)


def _completion(args: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["ibq-scale"], shell=args.shell))
    return 0


def answer_shell(parser: argparse.ArgumentParser) -> None:
    """Where a shell asks for completions, writes them and ends this process; does nothing otherwise."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    for action in _actions(parser):
        if action.dest == "source":
            action.completer = _sources  # type: ignore[attr-defined]
        elif action.dest == "overrides":
            action.completer = _overrides  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in dict.fromkeys(action.choices.values()):
                yield from _actions(below)
        else:
            yield action


def _sources(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Presets, with their stage where the command does not say it, and YAML files."""
    from argcomplete.completers import FilesCompleter

    from ibq_scale.config.layers import preset_names

    stage = getattr(parsed_args, "task", None)
    presets = [name for name in preset_names() if stage is None or name.startswith(f"{stage}/")]
    return [*(name.removeprefix(f"{stage}/") for name in presets), *FilesCompleter(("yaml", "yml"))(prefix)]


def _overrides(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Keys of the stage's schema; after the ``=`` the words that a key may be."""
    from ibq_scale.config.layers import SCHEMAS, schema_keys

    stage = getattr(parsed_args, "task", None) or str(getattr(parsed_args, "source", "")).partition("/")[0]
    schemas = [SCHEMAS[stage]] if stage in SCHEMAS else list(SCHEMAS.values())
    key, given, _value = prefix.partition("=")
    if not given:
        return [f"{key}=" for key in dict.fromkeys(key for schema in schemas for key in schema_keys(schema))]
    from ibq_scale.config.reference import choices

    return [f"{key}={word}" for schema in schemas for word in choices(schema, key)]
