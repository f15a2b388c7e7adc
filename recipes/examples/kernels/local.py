"""Local kernels on the line of a unit's own row, and an example of kernels that have knots.

A piece of a unit stands at a knot c of either sign, and sees s = g·x. Its kernel is largest where
s = c, and falls with the distance |s − c|, measured in lengths of |c|: a piece far out is as much
wider. Where values are a product (gated FFNs), it is multiplied by relu(±u·x).

Beyond the knots such kernels vanish, where an activation grows. The kernel ``brownian`` stays at
its largest there.

    hf-kernel-ffn convert MODEL OUT_DIR --rows tied \\
        --kernel recipes/examples/kernels/local.py:line-gaussian
"""

from hf_kernel_ffn import Kernel, register_kernel

BANDWIDTH = 0.5
"""Widths start at this share of |c|; a layer learns its own."""


class LineGaussian(Kernel):
    """κ = exp(−(s/c − 1)² / 2h²), with ``bandwidth`` = h."""

    def value(self, score, distance2=None, *, knot, bandwidth):
        return (-((score / knot - 1) / bandwidth).square() / 2).exp()


class LineIMQ(Kernel):
    """κ = 1 / √(1 + (s/c − 1)² / h²), with ``bandwidth`` = h."""

    def value(self, score, distance2=None, *, knot, bandwidth):
        return (1 + ((score / knot - 1) / bandwidth).square()).rsqrt()


class LineHat(Kernel):
    """κ = relu(1 − |s/c − 1|): zero at s = 0, and beyond s = 2c."""

    def value(self, score, distance2=None, *, knot):
        return (1 - (score / knot - 1).abs()).relu()


def register(kernel: type[Kernel], name: str, **parameters: float) -> None:
    """Register a ``kernel`` with knots, which is nonnegative."""
    register_kernel(
        kernel(
            name,
            nonnegative=True,
            positive_definite=False,
            uses_bias=True,
            uses_knot=True,
            parameters=parameters,
        )
    )


register(LineGaussian, "line-gaussian", bandwidth=BANDWIDTH)
register(LineIMQ, "line-imq", bandwidth=BANDWIDTH)
register(LineHat, "line-hat")
