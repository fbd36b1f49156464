"""``ibq-scale completion``: shell completion of commands, presets and keys (by argcomplete)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ibq_scale.cli.options import Family, argument

if TYPE_CHECKING:
    from pydantic import BaseModel

SHELLS = ("bash", "zsh", "fish")
COMMAND = Family()
add_commands = COMMAND.add_commands


@COMMAND.command(
    "shell completion of commands, presets and keys",
    "fish > ~/.config/fish/completions/ibq-scale.fish",
    argument("shell", choices=SHELLS),
)
def _completion(args: argparse.Namespace) -> int:
    """Put eval "$(ibq-scale completion bash)" into ~/.bashrc, or zsh's into ~/.zshrc; for fish: ibq-scale completion
    fish > ~/.config/fish/completions/ibq-scale.fish
    """
    from argcomplete.shell_integration import shellcode

    print(shellcode(["ibq-scale"], shell=args.shell))
    return 0


def answer_shell(parser: argparse.ArgumentParser) -> None:
    """Writes completions and ends this process if a shell asks for them."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    completers = {"source": _sources, "ladder": _ladders, "overrides": _overrides}
    for action in _actions(parser):
        if action.dest in completers:
            action.completer = completers[action.dest]  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in dict.fromkeys(action.choices.values()):
                yield from _actions(below)
        else:
            yield action


def _sources(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """YAML files and presets, with their stage if the command does not set it."""
    from argcomplete.completers import FilesCompleter

    from ibq_scale.config.layers import preset_names

    stage = getattr(parsed_args, "task", None)
    presets = [name for name in preset_names() if stage is None or name.startswith(f"{stage}/")]
    return [*(name.removeprefix(f"{stage}/") for name in presets), *FilesCompleter(("yaml", "yml"))(prefix)]


def _ladders(prefix: str, **_: Any) -> list[str]:
    from argcomplete.completers import FilesCompleter

    from ibq_scale.ladder.schema import ladder_names

    return [*ladder_names(), *FilesCompleter(("yaml", "yml"))(prefix)]


def _schemas(parsed_args: argparse.Namespace) -> list[type[BaseModel]]:
    """The schemas with the command's keys: of a ladder, of a stage, or of both stages."""
    from ibq_scale.config.layers import SCHEMAS
    from ibq_scale.ladder.schema import LadderConfig

    if hasattr(parsed_args, "ladder"):
        return [LadderConfig]
    stage = getattr(parsed_args, "task", None) or str(getattr(parsed_args, "source", "")).partition("/")[0]
    return [SCHEMAS[stage]] if stage in SCHEMAS else list(SCHEMAS.values())


def _overrides(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Keys of the schema, or after ``=`` the allowed words of a key."""
    from ibq_scale.config.layers import schema_keys

    schemas = _schemas(parsed_args)
    key, given, _value = prefix.partition("=")
    if not given:
        return [f"{key}=" for key in dict.fromkeys(key for schema in schemas for key in schema_keys(schema))]
    from ibq_scale.config.reference import choices

    return [f"{key}={word}" for schema in schemas for word in choices(schema, key)]
