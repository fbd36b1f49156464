"""What a sampling job leaves, by name: apart, so that whoever only looks for it need not import what makes it."""

from __future__ import annotations

SAMPLES, GRID, FACTS = "samples.npz", "grid.png", "samples.json"
