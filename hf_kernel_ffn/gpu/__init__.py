"""Fused Triton kernels, the trial that lets them in, and how layers are measured."""
