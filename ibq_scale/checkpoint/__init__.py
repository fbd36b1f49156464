"""Checkpoints: what ranks give to one, how it appears whole or not at all, copies elsewhere. Plain torch, no model."""
