"""Damaged and hostile files, made by thousands from seeds: none ends a program otherwise than in words."""
