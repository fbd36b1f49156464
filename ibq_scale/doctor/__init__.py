"""Checks of this machine. Each is a small function with findings as its result."""
