"""Units of an FFN as sums of kernels in their own plane: candidates, pursuit, refinement."""
