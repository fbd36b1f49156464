"""Measures of trained models and of their samples; every figure is the same for any number of ranks."""
