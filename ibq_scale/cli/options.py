"""The parts of a command's declaration: arguments with their bounds, the ranks of this node, text or JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, TypeAlias

from ibq_scale.errors import UserError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Argument = tuple[tuple[str, ...], dict[str, Any]]
Run = Callable[[argparse.Namespace], int]


class Family:
    """Commands with a common first word, or commands without one. `title` and `metavar`: of their list."""

    def __init__(self, name: str = "", about: str = "", title: str = "commands", metavar: str = "COMMAND") -> None:
        self.name, self.about, self.title, self.metavar = name, about, title, metavar
        self._declared: list[Callable[[Commands], None]] = []

    def command(
        self,
        about: str | None,
        example: str,
        *arguments: Argument,
        name: str | None = None,
        details: str | None = None,
        usage: str | None = None,
        **defaults: Any,
    ) -> Callable[[Run], Run]:
        """Declares the function below as a command of its name. `about` None: no line in the list.

        Its own help has `details` (default: the docstring) and the words of an example. With `RANKS` it is distributed,
        and `cli.main` starts its ranks if no launcher did. A default `check` runs before.
        """

        def declare(run: Run) -> Run:
            word = name or run.__name__.strip("_").replace("_", "-")
            texts: dict[str, Any] = {} if about is None else {"help": about}
            texts["description"] = details or " ".join((run.__doc__ or "").split()) or None
            texts["epilog"] = " ".join(filter(None, ("example: ibq-scale", self.name, word, example)))

            def add(commands: Commands) -> None:
                parser = commands.add_parser(word, usage=usage, **texts)
                for names, settings in arguments:
                    parser.add_argument(*names, **settings)
                parser.set_defaults(run=run, distributed=RANKS in arguments, **defaults)

            self._declared.append(add)
            return run

        return declare

    def add_commands(self, commands: Commands) -> None:
        if self.name:
            family = commands.add_parser(self.name, help=self.about)
            commands = family.add_subparsers(title=self.title, metavar=self.metavar, required=True)
        for add in self._declared:
            add(commands)


def argument(*names: str, **settings: Any) -> Argument:
    return names, settings


def flag(name: str, about: str) -> Argument:
    return argument(name, action="store_true", help=about)


def whole(
    name: str, about: str = "", default: int | None = None, *, least: int = 1, metavar: str = "N", **more: Any
) -> Argument:
    """A whole number of at least `least`, or a UserError."""
    return _number(
        name, int, about, default, lambda value: value >= least, f"at least {least}", metavar=metavar, **more
    )


def real(
    name: str, about: str = "", default: float | None = None, *, above: float = -math.inf, metavar: str | None = None
) -> Argument:
    """A finite number larger than `above`, or a UserError."""
    return _number(name, finite, about, default, lambda value: value > above, f"above {above:g}", metavar=metavar)


def _number(
    name: str, kind: Any, about: str, default: Any, allowed: Callable[[float], bool], bound: str, **more: Any
) -> Argument:
    def check(value: float) -> float:
        if not allowed(value):
            raise UserError(f"{name} must be {bound}, got {_said(value)}")
        return value

    if default is not None:
        about = f"{about} (default {_said(default)})" if about else f"default {_said(default)}"
    return argument(name, type=kind, action=Checked, check=check, default=default, help=about or None, **more)


def _said(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class Checked(argparse.Action):
    """Stores `check(value)` and lets its UserError through. argparse replaces the error of a `type` by its own."""

    def __init__(self, *args: Any, check: Callable[[Any], Any], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.check = check

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, self.check(values))


def finite(text: str) -> float:
    """A finite number. ``nan`` would spread through all results without a message."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return value


def _own_ranks(count: int) -> int:
    """In a Slurm step of one task, as in the shell of ``srun --pty bash``, Slurm's variables describe a single rank.

    They are dropped, and the command starts its own ranks.
    """
    if "RANK" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS")) == "1":
        for name in ("SLURM_PROCID", "SLURM_STEP_ID"):
            os.environ.pop(name, None)
    return count


RANKS = argument(
    "--ranks",
    type=int,
    action=Checked,
    check=_own_ranks,
    metavar="N",
    help="processes on this node (default: one a GPU, or 1)",
)
JSON = flag("--json", "print one JSON document")
OVERRIDES = argument("overrides", nargs="*", metavar="key=value")


def show(args: argparse.Namespace, document: object, lines: Iterable[str], indent: int | None = None) -> int:
    """Prints the lines, or with --json the document of JSON values and dataclasses. Returns 0, the exit code."""
    if args.json:
        print(json.dumps(document, default=asdict, indent=indent))
    else:
        for line in lines:
            print(line)
    return 0
