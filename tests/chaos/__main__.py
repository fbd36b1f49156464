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
    results = [
        _run(task, folder, args.kills, args.seed) for task in ([args.task] if args.task != "both" else SCENARIOS)
    ]
    print()
    for result in results:
        print("\n".join(result.summary()), flush=True)
    if args.to is not None:
        args.to.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    if any(result.faults for result in results):
        print(f"what was found lies in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def _run(task: str, folder: Path, kills: int, seed: int) -> Result:
    return Campaign(SCENARIOS[task], folder / task, kills, seed, lambda line: print(line, flush=True)).run()


if __name__ == "__main__":
    sys.exit(main())
