"""The first steps of every small preset, kept as data: ``python -m tests.tools.curves`` makes docs/curves.json anew.

A change of the code or of a package that changes training shows as a drift from the kept values
(tests/tools/test_curves.py). One rank trains on seeded pictures or codes, so a curve depends on nothing but rounding.
Rounding grows, since Adam's first steps follow the signs of gradients near 0, and tokens change their code. The tool
therefore trains with the kernels of other CPUs too, and keeps the largest difference of each value as its spread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.samples import CLASSES, write_codes, write_pictures

KEPT = Path(__file__).resolve().parents[2] / "docs/curves.json"
STEPS = {"tokenizer/tiny": 4, "tokenizer/demo": 8, "tokenizer/experiment": 10, "ar/tiny": 6, "ar/demo": 24}
METRICS = ("loss", "grad_norm", "l1", "quantization", "batch_entropy", "discriminator", "usage", "perplexity")
# Environment variables of other CPUs' kernels: of torch, of oneDNN and of MKL, and sums in two threads.
OTHERS: tuple[dict[str, str], ...] = (
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    {"OMP_NUM_THREADS": "2"},
)
# A value may differ by so many spreads and this share of itself: three samples do not show the largest difference.
SPREADS, SHARE = 5.0, 1e-3
Curve = dict[str, list[float]]
Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


class Kept(NamedTuple):
    """A preset's curve in docs/curves.json. `spread`: largest differences of other kernels' values."""

    values: Curve
    spread: Curve


def train(preset: str, folder: Path, run: Run, *overrides: str) -> Curve:
    """Trains the preset's first steps in an empty folder. Values of each step by metric."""
    stage = preset.partition("/")[0]
    data = folder / "data"
    words = ["train", stage, preset, f"data.train={data}", f"out={folder / 'run'}", f"train.steps={STEPS[preset]}"]
    if stage == "tokenizer":
        from ibq_scale.data.prepare import prepare_images

        write_pictures(folder / "pictures")
        prepare_images(folder / "pictures", str(data))
    else:
        from ibq_scale.config.layers import resolve

        model = resolve(preset).config.model
        write_codes(data, side=model.grid, codebook_size=model.codebook_size)
        words.append(f"model.classes={len(CLASSES)}")
    done = run([*words, "train.log_every=1", "data.workers=0", "--ranks", "1", *overrides])
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {name: [_short(line[name]) for line in lines] for name in METRICS if name in lines[0]}


def kept() -> dict[str, Kept]:
    """The curves of docs/curves.json by preset."""
    return {preset: Kept(**parts) for preset, parts in json.loads(KEPT.read_text()).items()}


def drifts(reference: Kept, found: Curve) -> Iterator[str]:
    """One line a metric with a value beyond its tolerance, at its first step."""
    assert reference.values.keys() == found.keys()
    for name, values in found.items():
        rows = zip(reference.values[name], values, reference.spread[name], strict=True)
        for step, (before, now, spread) in enumerate(rows, 1):
            tolerance = SPREADS * spread + SHARE * abs(before)
            if abs(now - before) > tolerance:
                yield f"{name}: {before} kept, {now} now, at step {step} (tolerance {tolerance:.2g})"
                break


def _short(value: float) -> float:
    """Six digits. Later ones are rounding on any CPU."""
    return float(f"{value:.6g}")


def _started(environ: Mapping[str, str]) -> Run:
    """Runs ``ibq-scale`` in a new interpreter, since kernels are chosen at its start."""

    def run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ibq_scale", *words]
        env = os.environ | {"OMP_NUM_THREADS": "1"} | environ
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    return run


def measure(preset: str) -> Kept:
    """Trains with this CPU's kernels and with the others."""
    curves = []
    for environ in ({}, *OTHERS):
        with tempfile.TemporaryDirectory(prefix="curves-") as folder:
            curves.append(train(preset, Path(folder), _started(environ)))
    own, *others = curves
    spread = {
        name: [float(f"{max(abs(x - other[name][i]) for other in others):.2g}") for i, x in enumerate(values)]
        for name, values in own.items()
    }
    return Kept(own, spread)


def _text(curves: Mapping[str, Kept]) -> str:
    """JSON with a line a metric."""
    presets = []
    for preset, parts in curves.items():
        rows = []
        for part, curve in parts._asdict().items():
            lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(values)}" for name, values in curve.items())
            rows.append(f"    {json.dumps(part)}: {{\n{lines}\n    }}")
        presets.append(f"  {json.dumps(preset)}: {{\n" + ",\n".join(rows) + "\n  }")
    return "{\n" + ",\n".join(presets) + "\n}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.curves", description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="only these (default: all)")
    args = parser.parse_args(argv)
    curves = kept() if args.presets else {}
    for preset in args.presets or STEPS:
        curves[preset] = measure(preset)
        losses, spreads = curves[preset].values["loss"], curves[preset].spread["loss"]
        print(f"{preset}: loss {losses[0]} ± {spreads[0]} … {losses[-1]} ± {spreads[-1]}", flush=True)
        KEPT.write_text(_text(curves))
    return 0


if __name__ == "__main__":
    sys.exit(main())
