"""What trained models write: code shards of images, and images of sampled codes."""
