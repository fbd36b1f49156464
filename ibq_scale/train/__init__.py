"""Training: one loop for both stages, on DeepSpeed engines, with the sharded codebook beside them."""
