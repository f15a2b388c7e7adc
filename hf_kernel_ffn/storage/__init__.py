"""Models on disk: loading, saving, verifying, publishing."""
