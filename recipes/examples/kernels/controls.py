"""The controls of the frontier's table, and an example of kernels of one's own.

They are ReLU and ReLU² of the score.

They know no distance, so they are no similarities: if a kernel does not beat them, its denominator
buys nothing.

    hf-kernel-ffn convert MODEL OUT_DIR --kernel recipes/examples/kernels/controls.py:relu2
"""

from hf_kernel_ffn import Kernel, register_kernel


class Relu(Kernel):
    """κ = relu(x·w + b)."""

    def value(self, score, distance2):
        return score.relu()


class Relu2(Kernel):
    """κ = relu(x·w + b)²."""

    def value(self, score, distance2):
        return score.relu().square()


register_kernel(Relu("relu", nonnegative=True, positive_definite=False, uses_bias=True, degree=1))
register_kernel(Relu2("relu2", nonnegative=True, positive_definite=False, uses_bias=True, degree=2))
