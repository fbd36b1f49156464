"""Ranks: how a process finds its place among the others."""
