"""Everything here travels inside converted checkpoints.

It is a flat folder that imports torch and transformers only, by ``from .file import name``.
"""
