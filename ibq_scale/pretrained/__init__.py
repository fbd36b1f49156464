"""Trained models on disk: our own directories and the published code's checkpoints."""
