"""Attribution graphs: which embeddings, units and heads made which, up to a logit, exactly.

* ``build`` makes the graph of a prompt; ``graph`` is what it is;
* ``pruning`` leaves out what matters least, and scores what is kept;
* ``effects`` says what the model does when a unit is taken away;
* ``labels`` names nodes, ``supernodes`` groups them;
* ``export`` writes a graph for the viewers of other packages, ``page`` as a page of its own;
* ``transcoders`` writes a layer for other packages where it is one of theirs;
* ``steps`` says how a coefficient is split over its scores, ``forms`` how it follows from them.
"""

from .build import attribution_graph
from .effects import measure_effects
from .export import graph_data, write_graph
from .graph import Graph, Node, Supernode
from .labels import label
from .page import write_page
from .pruning import influences, prune, score
from .supernodes import group, group_similar
from .transcoders import export_transcoders

__all__ = [
    "Graph",
    "Node",
    "Supernode",
    "attribution_graph",
    "export_transcoders",
    "graph_data",
    "group",
    "group_similar",
    "influences",
    "label",
    "measure_effects",
    "prune",
    "score",
    "write_graph",
    "write_page",
]
