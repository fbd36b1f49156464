"""Measurements that users can repeat: each prints a table, or JSON."""
