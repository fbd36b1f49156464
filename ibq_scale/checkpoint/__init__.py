"""Checkpoints: files of all ranks, atomic saves, copies in a mirror. Plain torch, no model."""
