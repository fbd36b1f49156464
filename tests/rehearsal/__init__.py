"""Training steps on fake CUDA tensors in a fake process group: what they wait for, send and launch, without a GPU."""
