"""Needs of a run before any GPU is requested: memory, FLOPs, time, scaling laws."""
