"""``python -m tests.chaos``: kills training processes at random and tells what came of it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from tests.chaos.campaign import Campaign, Result
from tests.chaos.scenario import SCENARIOS


def main() -> int:
    """Returns 0 where every kill left what it must and every run ended in the bits of the unkilled one, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--task", choices=[*SCENARIOS, "both"], default="both")
    parser.add_argument("--kills", type=int, default=50, help="for each task (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all that is random (default: the time)")
    parser.add_argument("--to", type=Path, help="write all kills there, as JSON")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ibq-chaos-"))
    # Killed processes leave sockets and locks there.
    os.environ["TMPDIR"] = str(folder / "tmp")
    (folder / "tmp").mkdir()
    tell = partial(print, flush=True)
    tell(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}")
    results: list[Result] = []
    for task in SCENARIOS if args.task == "both" else [args.task]:
        results.append(Campaign(SCENARIOS[task], folder / task, args.kills, args.seed, tell).run())
        tell("\n".join(["", *results[-1].summary(), ""]))
        if args.to is not None:
            args.to.parent.mkdir(parents=True, exist_ok=True)
            args.to.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    if any(result.faults for result in results):
        tell(f"what was found lies in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
