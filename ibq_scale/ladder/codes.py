"""Codes for a ladder of minutes: tiles of photographs, a tokenizer for each codebook, and the codes of both parts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ibq_scale.data.manifest import NAME as MANIFEST
from ibq_scale.distributed.launch import launch
from ibq_scale.errors import UserError
from ibq_scale.experiments.plan import Pictures
from ibq_scale.experiments.tiles import prepare_tiles
from ibq_scale.ladder.rungs import PARTS, code_urls
from ibq_scale.ladder.schema import LadderConfig, TilesConfig

TILES, TOKENIZERS = "tiles", "tokenizers"
BATCH = "256"
STDOUT, STDERR = 1, 2


def make_codes(ladder: LadderConfig) -> int:
    """Makes what is not there yet, by the commands that a user would type. Returns the first exit code that is not 0.

    UserError where the folder of pictures is none.
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
        raise UserError(f"tiles.pictures={tiles.pictures} is no folder: give one with photographs")
    kind: Pictures = "ten" if tiles.pictures is None else "photographs"
    images = prepare_tiles(kind, pictures, ladder.folder / TILES)
    tokenizer = str(ladder.folder / TOKENIZERS / str(codebook))
    _say(f"tokenizer of {codebook} codes")
    words = [*tiles.overrides, f"quantizer.codebook_size={codebook}", f"data.train={images['train']}"]
    code = _launch(["train", "tokenizer", tiles.tokenizer, *words, f"out={tokenizer}"])
    for part, url in zip(PARTS, code_urls(ladder, codebook), strict=True):
        if code == 0:
            code = _launch(["tokenize", tokenizer, images[part], "--to", str(url), "--batch", BATCH])
    return code


def _launch(words: list[str]) -> int:
    """On one rank, what it prints among the progress: the output of a ladder's command is its fit."""
    sys.stdout.flush()
    kept = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    try:
        return launch([*words, "--ranks", "1"], ranks=1)
    finally:
        os.dup2(kept, STDOUT)
        os.close(kept)


def _say(line: str) -> None:
    print(f"\n{line}", file=sys.stderr, flush=True)
