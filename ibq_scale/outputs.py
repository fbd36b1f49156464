"""File names of the outputs of `sample` and `evaluate`. A reader of them needs no import of their writers."""

from __future__ import annotations

SAMPLES, GRID, FACTS = "samples.npz", "grid.png", "samples.json"
RECONSTRUCTION, GENERATION = "reconstruction.json", "generation.json"
# Of `evaluate reconstruction`, image by image.
TABLE, WORST = "images.jsonl", "worst.png"
