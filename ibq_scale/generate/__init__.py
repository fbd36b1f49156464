"""Images out of a trained model, and codes out of images."""
