"""Entry of ``ibq-scale``: parses arguments, launches ranks for distributed commands, turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong use or bad input, 69 the object storage did not answer, 70 hung and ended itself,
71 a node failed its check, 75 stopped by a signal with everything saved (run it again).
"""

from __future__ import annotations

import argparse
import atexit
import errno
import importlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from ibq_scale.cli.completion import answer_shell
from ibq_scale.console import tells
from ibq_scale.distributed.signals import blocked, ignore
from ibq_scale.errors import UserError

FAMILIES = (
    "data",
    "train",
    "submit",
    "jobs",
    "tokenize",
    "sample",
    "evaluate",
    "checkpoint",
    "fetch_weights",
    "config",
    "plan",
    "scale",
    "doctor",
    "report",
    "demo",
    "bench",
    "experiments",
    "job_ended",
    "completion",
)

# By import name.
OF_TRAINING = {
    "deepspeed", "lpips", "ninja", "packaging", "prometheus_client", "psutil", "s3fs", "simplejpeg", "torch_fidelity",
    "torchvision", "wandb", "webdataset",
}  # fmt: skip


# Errors of a path itself, independent of the disk behind it.
MISTAKEN_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
MOST_CHARACTERS = 1000
"""Most characters of a line of an error."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. It imports nothing heavy: each command imports the rest when it runs."""
    parser = argparse.ArgumentParser(
        prog="ibq-scale",
        description="Train image tokenizers with huge codebooks, and autoregressive models on their codes.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for family in FAMILIES:
        importlib.import_module(f"ibq_scale.cli.{family}").add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    code = _code(words)
    if argv is None:
        # The process ends now. A signal must not replace its exit code.
        ignore()
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """Ends the process as an interpreter does, but without the teardown of modules: it takes 1 to 3 CPU s after torch.

    Threads are joined, exit handlers run (of W&B, multiprocessing, temporary folders) and output is flushed.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        pass
    except OSError as e:
        code = code or 1
        with suppress(OSError):
            os.write(2, f"ibq-scale: the output could not be written: {e}\n".encode())
    os._exit(code)


def _code(words: list[str]) -> int:
    try:
        # The deepspeed launcher appends --local_rank. The environment already has it.
        args = _parse([w for w in words if not w.startswith("--local_rank")])
        return _run(args, words)
    except UserError as e:
        _complain(str(e))
        return e.exit_code
    except ModuleNotFoundError as e:
        if not _is_for_training(e):
            raise
        _complain(f"this needs {e.name}: pip install 'ibq-scale[train]'")
        return UserError.exit_code
    except BrokenPipeError:
        # `ibq-scale … | head` closed our output: not an error. Keep the interpreter from flushing into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        if e.errno is None or (e.filename is None and not full):
            raise
        # A user's path, or the disk behind it. An error without a file name comes from the output.
        _complain(f"{e.filename or 'the output could not be written'}: {e.strerror}")
        return 1 if full else UserError.exit_code
    except RuntimeError as e:
        # Raised by Path.resolve for links in a loop.
        if not str(e).startswith("Symlink loop"):
            raise
        _complain(str(e))
        return UserError.exit_code
    except KeyboardInterrupt:
        # A terminal's Ctrl-C comes a second time from the launcher.
        ignore()
        _complain("interrupted")
        return 1


def _parse(words: list[str]) -> argparse.Namespace:
    """As argparse, but overrides may also stand after a command's options. argparse takes them only before."""
    parser = build_parser()
    answer_shell(parser)
    args, left = parser.parse_known_args(words)
    if left and not (hasattr(args, "overrides") and all("=" in w and not w.startswith("-") for w in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        args.overrides = [*args.overrides, *left]
    return args


def _run(args: argparse.Namespace, words: list[str]) -> int:
    if not getattr(args, "distributed", False):
        code: int = args.run(args)
        return code
    from ibq_scale.distributed.environment import is_launched
    from ibq_scale.distributed.launch import launch

    # A signal during these imports stays pending until a handler is ready.
    with blocked():
        if is_launched():
            return _run_rank(args)
        if hasattr(args, "check"):
            args.check(args)
        return launch(words, ranks=args.ranks)


def _run_rank(args: argparse.Namespace) -> int:
    """One rank's part. After an unexpected error the rank exits without cleanup.

    Threads of an open process group may turn a normal exit into an abort, with the abort's exit code and a C++ trace.
    """
    from ibq_scale.distributed.failures import leave_or_tell

    try:
        code: int = args.run(args)
    except UserError as e:
        leave_or_tell(e, e.exit_code)
        return e.exit_code
    except Exception as e:
        if isinstance(e, BrokenPipeError) or _is_for_training(e):
            raise
        if isinstance(e, OSError) and e.errno in MISTAKEN_PATHS:
            leave_or_tell(UserError(f"{e.filename}: {e.strerror}"), UserError.exit_code)
            return UserError.exit_code
        leave_or_tell(e, 1)
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1)
    return code


def _is_for_training(error: Exception) -> bool:
    """Whether the error is a missing package of the extra 'train'."""
    return isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] in OF_TRAINING


def _complain(message: str) -> None:
    # Every rank has the same bad input, so one of them reports it.
    if tells():
        print("\n".join(map(_cut, f"ibq-scale: {message}".splitlines())), file=sys.stderr, flush=True)


def _cut(line: str) -> str:
    """The line, shortened if it repeats a long value of a user or a file."""
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 200]} … {line[-200:]}"


if __name__ == "__main__":
    sys.exit(main())
