"""Measures of trained models: reconstruction now; every figure is the same for any number of ranks."""
