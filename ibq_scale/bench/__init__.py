"""Repeatable measurements. Each prints a table or JSON."""
