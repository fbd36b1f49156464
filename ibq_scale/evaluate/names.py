"""What evaluations leave, by name: apart, so that whoever only looks for it need not import what makes it."""

from __future__ import annotations

RECONSTRUCTION, GENERATION = "reconstruction.json", "generation.json"
# Of a reconstruction, image by image.
TABLE, WORST = "images.jsonl", "worst.png"
