"""The paper's experiments in small: which runs, how they are made, and what docs/experiments.md says of them."""
