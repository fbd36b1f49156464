"""DeepSpeed's internals: engines, their state in pieces, master weights, sharded EMA, memory, export."""
