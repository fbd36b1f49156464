"""Runs one kind of files through the programs that read them, again and again, in a process of its own."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ibq_scale.cli.main import main
from ibq_scale.errors import UserError
from tests.fuzz.mutations import mutate

SECONDS, BYTES = 10.0, 1_500_000_000
"""Of one input, at most: time and resident memory."""
FILE_CHANGES = ("gone", "folder", "pipe", "loop", "outside", "renamed")
NAMES = (
    b"\xff\xfe.jpg",
    b"a\nb.jpg",
    b" ",
    b"a'b.jpg",
    b"-x",
    b"[a].jpg",
    b"x" * 240,
    b"manifest.json",
    b".hidden",
    b"a.tar",
)


@dataclass(frozen=True)
class Target:
    """A kind of files. `make` writes good ones into a folder, `use` reads them there; `victims`: patterns of those that
    are changed. `mend` stamps hashes anew after a change, so that what lies behind them is reached.
    """

    name: str
    make: Callable[[Path], None]
    victims: Sequence[str]
    use: Callable[[Path, Random], None]
    mend: Callable[[Path], None] | None = None


class FoundError(AssertionError):
    """What no input may bring about."""


def command(*words: object) -> None:
    """``ibq-scale WORDS`` in this process. FoundError where its end is not an orderly one."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code: object = main([str(word) for word in words])
        except SystemExit as e:
            code = e.code
    text = said.getvalue()
    if code not in (0, 1, 2):
        raise FoundError(f"exit code {code}: {text[-500:]}")
    if "Traceback" in text:
        raise FoundError(text[-2000:])
    if code == 2 and len(text) > 4000:
        raise FoundError(f"{len(text)} characters of an error: {text[:300]} … {text[-300:]}")


def fuzz(target: Target, seeds: Sequence[int], folder: Path) -> None:
    """Writes a line each seed to FOLDER/log: its number, then ``ok`` or what went wrong."""
    good, canary, work = folder / "good", folder / "canary", folder / "work"
    for path in (good, canary, folder / "tmp"):
        path.mkdir(parents=True)
    (canary / "kept").write_text("kept")
    # Nothing in these folders of a user may change either.
    os.environ |= {"HOME": str(canary), "XDG_CONFIG_HOME": str(canary), "TMPDIR": str(folder / "tmp")}
    os.environ["SLURM_TMPDIR"] = str(folder / "tmp")
    target.make(good)
    kept = _digest(canary, good)
    with (folder / "log").open("w") as log, (folder / "stacks").open("w") as stacks:
        for seed in seeds:
            print(seed, end=" ", file=log, flush=True)
            # Threads of an earlier stream may still write into its folder.
            shutil.rmtree(work, ignore_errors=True)
            work = folder / f"work-{seed}"
            shutil.copytree(good, work, symlinks=True)
            faulthandler.dump_traceback_later(SECONDS + 5, exit=True, file=stacks)
            found = _one(target, Random(seed), work)
            faulthandler.cancel_dump_traceback_later()
            if not found and (now := _digest(canary, good)) != kept:
                found = f"written outside: {sorted(set(now) ^ set(kept))}"
                kept = now
            print(found.replace("\n", " | ") or "ok", file=log, flush=True)


def _one(target: Target, random: Random, work: Path) -> str:
    changed = _change(target, random, work)
    if target.mend is not None and random.random() < 0.7:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            target.mend(work)
    before = Path.cwd()
    os.chdir(work)
    Path("/proc/self/clear_refs").write_text("5")
    begun = time.monotonic()
    try:
        target.use(work, random)
    except UserError:
        pass
    except FoundError as e:
        return f"{changed}: {e}"
    except BaseException:
        return f"{changed}: {traceback.format_exc()[-1500:]}"
    finally:
        os.chdir(before)
    if (seconds := time.monotonic() - begun) > SECONDS:
        return f"{changed}: {seconds:.0f} s"
    if (peak := _peak()) > BYTES:
        return f"{changed}: {peak / 1e9:.1f} GB of memory"
    return ""


def _change(target: Target, random: Random, work: Path) -> str:
    """Changes one to three of the files, and says how."""
    said = []
    for _ in range(random.choice((1, 1, 1, 2, 3)) if target.victims else 0):
        pattern = random.choice(target.victims)
        files = sorted(path for path in work.glob(pattern) if path.is_file() and not path.is_symlink())
        if not files:
            continue
        path = random.choice(files)
        if random.random() < 0.1:
            how = random.choice(FILE_CHANGES)
            if how == "renamed":
                path.rename(path.parent / os.fsdecode(random.choice(NAMES)))
            else:
                path.unlink()
            match how:
                case "folder":
                    path.mkdir()
                case "pipe":
                    os.mkfifo(path)
                case "loop":
                    path.symlink_to(path.name)
                case "outside":
                    path.symlink_to(work.parent / "canary/kept")
        else:
            how = "changed"
            path.write_bytes(mutate(random, path.name, path.read_bytes()))
        said.append(f"{path.relative_to(work)} {how}")
    return ", ".join(said)


def _digest(*folders: Path) -> list[tuple[str, str]]:
    return [
        (str(path), hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for folder in folders
        for path in sorted(folder.rglob("*"))
    ]


def _peak() -> int:
    """Bytes of resident memory at most, since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    from tests.fuzz.targets import TARGETS

    (name, first, count, where) = sys.argv[1:]
    fuzz(TARGETS[name], range(int(first), int(first) + int(count)), Path(where))
