"""Loss terms around the tokenizer; the quantizer brings its own."""
