"""The command line. An import of this package sets up the process for any command."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def _be_of_utf8() -> None:
    """Restarts this command in UTF-8 mode if the locale makes Python read file names as ASCII."""
    own = sys.orig_argv[1:3] == ["-m", "ibq_scale"] or Path(sys.argv[0]).name == "ibq-scale"
    if own and sys.getfilesystemencoding().lower() != "utf-8" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _print_anything() -> None:
    """Prints a name outside the locale's characters in escapes, without an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _have_a_home() -> None:
    """In a container, a foreign user id has no HOME and no line in the passwd file, and many libraries need one.

    A folder of this user in the temporary folder takes its place.
    """
    try:
        Path.home()
        return
    except RuntimeError:
        pass
    folder = Path(tempfile.gettempdir()) / f"ibq-scale-home-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        mine = folder.stat().st_uid == os.getuid()
    except OSError:
        mine = False
    os.environ["HOME"] = str(folder if mine else tempfile.mkdtemp(prefix="ibq-scale-home-"))
    os.environ.setdefault("USER", str(os.getuid()))


_be_of_utf8()
_print_anything()
_have_a_home()
