"""Runs a ladder on this machine, one rung after the other, by ordinary commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ibq_scale.checkpoint.reading import whole_checkpoints
from ibq_scale.config.layers import load_resolved
from ibq_scale.data.manifest import NAME as MANIFEST
from ibq_scale.distributed.launch import launch
from ibq_scale.errors import UserError
from ibq_scale.experiments.plan import Pictures
from ibq_scale.experiments.run import same_training
from ibq_scale.experiments.tiles import prepare_tiles
from ibq_scale.ladder.rungs import PARTS, Rung, code_urls, rungs_of
from ibq_scale.ladder.schema import LadderConfig, TilesConfig

TILES, TOKENIZERS = "tiles", "tokenizers"
BATCH = "256"
STDOUT, STDERR = 1, 2


def run_ladder(ladder: LadderConfig) -> int:
    """Makes codes if the ladder needs them, and trains every rung. Finished rungs are skipped, unfinished ones resume.

    Returns 0, or the exit code of the first failed command (75: stopped by a signal, everything saved). UserError for a
    folder with a run of another config, before any training.
    """
    rungs = rungs_of(ladder)
    finished = [is_finished(rung) for rung in rungs]
    code = 0 if all(finished) else make_codes(ladder)
    for number, (rung, done) in enumerate(zip(rungs, finished, strict=True), 1):
        if code:
            return code
        if done:
            continue
        print(f"\n[{number}/{len(rungs)}] {rung.name}", file=sys.stderr, flush=True)
        ranks = ladder.machine.ranks
        options = [] if ranks is None else ["--ranks", str(ranks)]
        code = launch(["train", "ar", rung.preset, *rung.words, *options], ranks=ranks)
    return code


def is_finished(rung: Rung) -> bool:
    """Whether a whole checkpoint has all its steps. UserError if the folder holds a run of another config."""
    config = rung.folder / "config.yaml"
    if not config.is_file():
        return False
    if not same_training(load_resolved(config), rung.run):
        raise UserError(f"{rung.folder} is a run of another config: remove it, or give the ladder another out=…")
    whole = whole_checkpoints(rung.folder / "checkpoints")
    return bool(whole) and whole[-1].step >= rung.run.train.total_steps


def make_codes(ladder: LadderConfig) -> int:
    """Makes missing codes by ordinary commands: tiles, a tokenizer per codebook, codes of both parts. Returns the first
    failed exit code, or 0.

    UserError if the folder of pictures does not exist.
    """
    tiles = ladder.tiles
    if tiles is None:
        return 0
    for codebook in ladder.codes.codebooks:
        if not all((Path(str(url)) / MANIFEST).is_file() for url in code_urls(ladder, codebook)):
            code = _make(ladder, tiles, codebook)
            if code:
                return code
    return 0


def _make(ladder: LadderConfig, tiles: TilesConfig, codebook: int) -> int:
    pictures = Path(tiles.pictures or ".")
    if tiles.pictures is not None and not pictures.is_dir():
        raise UserError(f"tiles.pictures={tiles.pictures} is not a folder: give one with photographs")
    kind: Pictures = "ten" if tiles.pictures is None else "photographs"
    images = prepare_tiles(kind, pictures, ladder.folder / TILES)
    tokenizer = str(ladder.folder / TOKENIZERS / str(codebook))
    print(f"\ntokenizer of {codebook} codes", file=sys.stderr, flush=True)
    words = [*tiles.overrides, f"quantizer.codebook_size={codebook}", f"data.train={images['train']}"]
    code = _launch(["train", "tokenizer", tiles.tokenizer, *words, f"out={tokenizer}"])
    for part, url in zip(PARTS, code_urls(ladder, codebook), strict=True):
        if code == 0:
            code = _launch(["tokenize", tokenizer, images[part], "--to", str(url), "--batch", BATCH])
    return code


def _launch(words: list[str]) -> int:
    """Runs on one rank with its output on standard error. The ladder's standard output is the fit."""
    sys.stdout.flush()
    kept = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    try:
        return launch([*words, "--ranks", "1"], ranks=1)
    finally:
        os.dup2(kept, STDOUT)
        os.close(kept)
