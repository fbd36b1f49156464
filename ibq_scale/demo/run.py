"""The demo's stages, one after the other, by ordinary commands."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ibq_scale.console import output_of
from ibq_scale.demo.photographs import PHOTOGRAPHS, write_crops
from ibq_scale.demo.plan import CODES, HELD_OUT, IMAGES, Demo, Plan, Stage
from ibq_scale.demo.report import write_demo_report
from ibq_scale.demo.server import object_storage
from ibq_scale.errors import UserError

MARKER = ".ibq-scale-demo"
# The preset is tuned for IBQ. These were the best of the settings tried for VQ (docs/experiments.md).
VQ = ("quantizer.kind=vq", "loss.quantization_weight=1.0", "optimizer.codebook_lr=3e-3")


class StageFailedError(RuntimeError):
    """A failed command of the demo. Its output stands above."""


def run_demo(to: Path, plan: Plan) -> dict[str, Any]:
    """Runs every stage and writes ``report.html`` and ``report.json`` into `to`. Returns the content of the latter.

    An earlier demo in `to` is replaced. UserError if `to` holds anything else.
    """
    _clear(to)
    demo = Demo(to, plan)
    with object_storage():
        _run_stages(demo)
        return write_demo_report(demo)


def _clear(to: Path) -> None:
    if to.exists() and not to.is_dir():
        raise UserError(f"{to} is a file: give a folder with --to")
    if to.is_dir() and any(to.iterdir()):
        if not (to / MARKER).is_file():
            raise UserError(f"{to} holds something else than an earlier demo: give another folder with --to")
        shutil.rmtree(to)
    to.mkdir(parents=True, exist_ok=True)
    (to / MARKER).touch()


def _run_stages(demo: Demo) -> None:
    plan, ranks = demo.plan, str(demo.plan.ranks)
    ibq, vq, ar = (str(demo.run_dir(name)) for name in ("ibq", "vq", "ar"))
    cache = f"data.cache_dir={demo.to / 'cache'}"

    def step(name: str, *words: str) -> None:
        _command(demo, name, list(words))

    def train(name: str, *words: str) -> None:
        step(name, "train", *words, cache, "--ranks", ranks)

    crops, held_out = demo.crops_dir("photographs"), demo.crops_dir("held-out")
    with _timed(demo, "crop the photographs", "(crops of the pictures that scikit-image and scikit-learn ship)"):
        write_crops(crops, plan.crops, seed=0)
        write_crops(held_out, plan.held_out_crops, seed=1)
    for name, folder, url in (("prepare", crops, IMAGES), ("prepare the held-out crops", held_out, HELD_OUT)):
        step(name, "prepare", "images", str(folder), "--to", url, "--shard-mb", "1", "--json")
    steps = f"train.steps={plan.tokenizer_steps}"
    tokenizer = ("tokenizer", "tokenizer/demo", f"data.train={IMAGES}", f"validation.data={HELD_OUT}", steps)
    train("train the IBQ tokenizer", *tokenizer, f"out={ibq}")
    train("train the VQ baseline", *tokenizer, f"out={vq}", *VQ)
    step("tokenize", "tokenize", ibq, IMAGES, "--to", CODES, "--ranks", ranks, "--json")
    transformer = ("ar", "ar/demo", f"data.train={CODES}", f"train.steps={plan.ar_steps}", f"out={ar}")
    train("train the AR transformer", *transformer, f"model.classes={len(PHOTOGRAPHS)}")
    options = ["--guidance", str(plan.guidance), "--per-class", str(plan.per_class), "--to", str(demo.to / "samples")]
    step("sample", "sample", ar, "--tokenizer", ibq, *options, "--ranks", ranks, "--json")
    for name, run in (("evaluate IBQ", ibq), ("evaluate VQ", vq)):
        step(name, "evaluate", "reconstruction", run, HELD_OUT, "--ranks", ranks, "--json")


def _command(demo: Demo, name: str, words: list[str]) -> None:
    """Runs one command. A JSON document in its output becomes the stage's result."""
    shown = shlex.join(["ibq-scale", *words])
    with _timed(demo, name, shown):
        print(f"\n$ {shown}", file=sys.stderr, flush=True)
        process = output_of(words)
        if process.returncode:
            raise StageFailedError(f"'{shown}' ended with exit code {process.returncode}")
        if "--json" in words:
            demo.results[name] = json.loads(process.stdout)


@contextmanager
def _timed(demo: Demo, name: str, command: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    demo.stages.append(Stage(name, command, time.perf_counter() - begin))
