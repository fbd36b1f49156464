"""Loss terms of the tokenizer, except the quantizer's."""
