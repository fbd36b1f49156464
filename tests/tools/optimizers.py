"""Held-out loss of AdamW and Muon at equal steps: the table of docs/how-it-works.md.

``python -m tests.tools.optimizers CODES HELD_OUT --to results.json`` trains small transformers of some widths in this
process and goes on after a stop. Both have the same rate, decay and batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from ibq_scale.config.layers import with_values
from ibq_scale.config.run import ARRun
from tests.tools.orders import held_out, run_of, train

KINDS = ("adam", "muon")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codes")
    parser.add_argument("held_out")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, float] = json.loads(args.to.read_text()) if args.to.is_file() else {}
    print(f"| width | rate | {' | '.join(KINDS)} |")
    for width, rate in ((width, rate) for width in args.widths for rate in args.rates):
        means = []
        for kind in KINDS:
            names = [f"{kind} {width} {rate:g} {args.steps} {seed}" for seed in args.seeds]
            for name, seed in zip(names, args.seeds, strict=True):
                if name not in found:
                    begin, run = time.process_time(), run_of(args.codes, "raster", seed, args.steps)
                    words = {"optimizer.kind": kind, "optimizer.lr": rate, "model.width": width}
                    run = with_values(run, words)
                    assert isinstance(run, ARRun)
                    found[name] = held_out(train(run), args.held_out, run, 2000)
                    args.to.write_text(json.dumps(found, indent=1) + "\n")
                    print(f"{name}: {found[name]:.4f} ({time.process_time() - begin:.0f} CPU s)", flush=True)
            losses = [found[name] for name in names]
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            means.append(f"{statistics.mean(losses):.3f} ± {spread:.3f}")
        print(f"| {width} | {rate:g} | {' | '.join(means)} |", flush=True)


if __name__ == "__main__":
    main()
