"""Ladders: transformers of several sizes on several budgets, from one file to a law and its report."""
