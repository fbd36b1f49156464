"""Loss terms around the tokenizer. The quantizer has its own."""
