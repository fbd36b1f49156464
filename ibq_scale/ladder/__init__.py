"""Ladders: transformers of several sizes on several budgets, with a law and a report."""
