"""From a stock FFN's rows and columns to input and output prototypes.

Rows and columns come from the teacher. What the rows' scale, shift and mixing ratio should be is
read off a sample of the layer's own inputs, one unit at a time, by least squares over a short list
of candidates.

An initialiser is one file with one function under
:func:`~hf_kernel_ffn.conversion.initialization.prototypes.register_initialiser`; the import below
registers it.
"""

from . import firing_means, rows
from .prototypes import (
    Prototypes,
    initial_gate_bias,
    initial_kernel_parameters,
    initialise_prototypes,
    register_initialiser,
)

__all__ = [
    "Prototypes",
    "firing_means",
    "initial_gate_bias",
    "initial_kernel_parameters",
    "initialise_prototypes",
    "register_initialiser",
    "rows",
]
