"""Quantizers in plain torch: no DeepSpeed, no training loop; usable from a notebook."""
