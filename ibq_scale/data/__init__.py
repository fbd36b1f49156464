"""From pictures in a folder to tensors on a rank: store, manifest, prepare, order, stream, codes."""
