"""Networks in plain torch, and how they are stored: no DeepSpeed, no training loop."""
