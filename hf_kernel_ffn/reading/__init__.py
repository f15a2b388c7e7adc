"""Read any FFN, converted or untouched, and any attention head, through one record: coefficients over a named dictionary.

:func:`trace` keeps one forward pass; its records go to the functions of the other files:
``regimes`` what may be said · ``attribution`` who wrote a logit · ``naming`` what prototypes read and write · ``dial``
temperature and far inputs · ``geometry`` kernel matrices and norms · ``decompositions`` other mixtures of the same output ·
``editing`` change one prototype · ``steering`` find the change · ``support`` how well an input is covered · ``report`` all of it as one page.
"""

from .tracing import Trace, ffn_readout, trace

__all__ = ["Trace", "ffn_readout", "trace"]
