"""The paper's experiments at a small scale: plan, runs, results, and the tables of docs/experiments.md."""
