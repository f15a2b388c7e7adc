"""Read any FFN, converted or untouched, and any attention head, through one record.

A record is coefficients over a named dictionary.

:func:`trace` keeps one forward pass; its records go to the functions of the other files:

* ``regimes`` what may be said of a mixture; ``attribution`` who wrote a logit; ``summary`` both, in
  plain values;
* ``naming`` and ``lens`` what prototypes write and listen for; ``contexts`` where they fire;
* ``dial`` temperature, and ``far_field`` far inputs; ``geometry`` kernel matrices and norms;
  ``attention`` its symmetrised kernel; ``prices`` of writing in a direction; ``decompositions``
  other mixtures of the same output;
* ``editing`` change one prototype; ``steering`` find the change; ``support`` how well an input is
  covered;
* ``graph`` which units made which, up to a logit;
* ``report`` all of it as one page; ``validate`` whether a family's entry is right.
"""

from .model_parts import ffn_readout
from .tracing import Trace, trace

__all__ = ["Trace", "ffn_readout", "trace"]
