"""Fills slurm/*.sbatch, the files for submission by hand too: #SBATCH lines, marked blocks, the command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ibq_scale.errors import UserError

# An option in the file, set or offered by a second '#'. A comment may follow the value.
OPTION = re.compile(r"^(#{1,2})SBATCH --(?P<key>[a-z-]+)(?:=(?P<value>\"[^\"]*\"|\S+))?(?P<rest>.*)$")
# The lines of an sbatch file up to its ``source``.
SHARED = re.compile(r"^# Slurm runs a copy.*?^source [^\n]*\n", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^IBQ_SCALE=.*$", re.MULTILINE)


@dataclass(frozen=True)
class Script:
    text: str

    @staticmethod
    def of(name: str) -> Script:
        """slurm/NAME.sbatch with the text of common.sh, beside the package in a checkout, inside it when installed."""
        package = Path(__file__).resolve().parents[1]
        for folder in (package.parent / "slurm", package / "slurm"):
            if (folder / f"{name}.sbatch").is_file():
                own, shared = ((folder / file).read_text(encoding="utf-8") for file in (f"{name}.sbatch", "common.sh"))
                return Script(shared.join(SHARED.split(own)))
        raise UserError(f"slurm/{name}.sbatch is not beside the package: this installation is not whole")

    def option(self, key: str) -> str | None:
        """An option's value. ``""``: set without a value. None: not set."""
        for line in self.text.splitlines():
            found = OPTION.match(line)
            if found and found["key"] == key and found[1] == "#":
                return (found["value"] or "").strip('"')
        return None

    def with_options(self, options: Mapping[str, str | None]) -> Script:
        """Sets options. ``""`` sets one without a value, None removes it. UserError for values unfit for sbatch."""
        lines = self.text.splitlines()
        for key, value in options.items():
            at = [i for i, line in enumerate(lines) if (found := OPTION.match(line)) and found["key"] == key]
            if value is None:
                lines = [line for i, line in enumerate(lines) if i not in at]
            elif at:
                found = OPTION.match(lines[at[0]])
                # The comment may describe the old value only.
                if found is None or found[1] != "#" or (found["value"] or "").strip('"') != value:
                    lines[at[0]] = _option(key, value)
            else:
                last = max(i for i, line in enumerate(lines) if OPTION.match(line))
                lines.insert(last + 1, _option(key, value))
        return Script("\n".join(lines) + "\n")

    def with_block(self, name: str, added: Sequence[str]) -> Script:
        """Adds lines at the end of the block between ``# >>> name`` and ``# <<< name``."""
        if not added:
            return self
        end = f"# <<< {name}\n"
        if self.text.count(end) != 1:
            raise UserError(
                f"the sbatch file has no block '# >>> {name}' … '# <<< {name}': take the one of this release"
            )
        return Script(self.text.replace(end, "".join(f"{line}\n" for line in added) + end))

    def with_command(self, path: str) -> Script:
        """Sets the path of ``ibq-scale`` on the nodes."""
        line = f"IBQ_SCALE={shlex.quote(path)}"
        return Script(COMMAND.sub(lambda _: line, self.text, count=1))


def parse_option(text: str) -> tuple[str, str]:
    """``--reservation=x``, ``reservation=x`` ``#SBATCH --exclusive`` → key and value. UserError for all else."""
    found = re.fullmatch(r"(?:#SBATCH\s+)?(?:--)?([a-z][a-z-]*)(?:=(.+))?", text.strip())
    if found is None:
        raise UserError(f"'{text}' is not an sbatch option: write it in full, for example --reservation=x")
    if found[1] == "array":
        raise UserError("an array's jobs share their work by --array N (submit), and need all of 0 to N-1")
    return found[1], found[2] or ""


def environment_lines(values: Mapping[str, str]) -> list[str]:
    """``export`` lines. A value may use other variables ("$HOME/x")."""
    for name in values:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"env: '{name}' is not a variable name")
    return [f"export {name}={double_quoted(value)}" for name, value in values.items()]


def python_path_line(folder: str) -> str:
    """The ``export`` line for `folder` at the head of PYTHONPATH. UserError for a folder with ``:`` or a line break."""
    if ":" in folder or "\n" in folder:
        raise UserError(f"{folder!r}: PYTHONPATH cannot name a folder with ':' or a line break: give another out=…")
    return f'export PYTHONPATH={shlex.quote(folder)}"${{PYTHONPATH:+:$PYTHONPATH}}"'


def double_quoted(value: str) -> str:
    """A shell word in double quotes. It expands ``$NAME`` and ``${NAME}`` only, and runs no command."""
    if "\n" in value or "\0" in value:
        raise UserError(f"{value!r}: a line break cannot stand in a job's script")
    return '"' + re.sub(r'(["\\`]|\$(?!\w|\{\w+\}))', r"\\\1", value) + '"'


def _option(key: str, value: str) -> str:
    if re.search(r'["\\\n\0]', value):
        raise UserError(f"--{key}: sbatch takes no quotes, backslashes or line breaks, got {value!r:.100}")
    quoted = f'"{value}"' if re.search(r"[\s#']", value) else value
    return f"#SBATCH --{key}" + (f"={quoted}" if value else "")
