"""Attribution graphs: which embeddings, units and heads made which, up to a logit, exactly.

* ``build`` makes the graph of a prompt; ``graph`` is what it is;
* ``pruning`` leaves out what matters least, and scores what is kept;
* ``steps`` says how a coefficient is split over its scores, ``forms`` how it follows from them.
"""

from .build import attribution_graph
from .graph import Graph, Node, Supernode
from .pruning import influences, prune, score

__all__ = ["Graph", "Node", "Supernode", "attribution_graph", "influences", "prune", "score"]
