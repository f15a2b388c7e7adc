"""Text to token ids, and what a model reads and predicts of them."""
