"""Everything here travels inside converted checkpoints: a flat folder that imports torch and transformers only."""
