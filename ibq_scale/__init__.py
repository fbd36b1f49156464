"""IBQ image tokenizers and autoregressive models on their codes."""
