"""hf-kernel-ffn graph."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .options import Bos, Device, Trust, make_text_format, quieten
from .tables import print_table

if TYPE_CHECKING:
    from ..reading.graph import Graph

TABLE_ROWS = 20
"""Nodes that are printed."""
INPUTS = 3
"""Inputs of a node that are printed with it."""
CONTEXT_LENGTH = 256
"""Tokens of a row of it."""
CONTEXT_ROWS = 8
"""Rows of it that the model reads at once."""
CONTEXT_TOKENS = 16_384
"""Tokens of ordinary text that are read for contexts."""


def graph(
    model: Annotated[str, typer.Argument(help="local folder or hub id, converted or stock")],
    prompt: Annotated[str, typer.Option(help="text whose next token is to be explained")],
    target: Annotated[
        Optional[list[str]],
        typer.Option(
            help="token to explain, with its space; may be repeated  [default: the likeliest]"
        ),
    ] = None,
    against: Annotated[
        Optional[str],
        typer.Option(
            help="token whose logit is subtracted  [default: the mean over the vocabulary]"
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option(help="units, and heads if they are nodes, to find the inputs of")
    ] = 256,
    keep: Annotated[
        float, typer.Option(help="share of the influence that the nodes kept of those have")
    ] = 0.8,
    heads: Annotated[bool, typer.Option("--heads", help="make attention heads nodes")] = False,
    rule: Annotated[
        str, typer.Option(help="how a coefficient is split over its scores: half or derivative")
    ] = "half",
    group: Annotated[
        Optional[float],
        typer.Option(help="group units that are at least as similar, such as 0.6"),
    ] = None,
    text: Annotated[
        Optional[str], typer.Option(help="ordinary text, for the contexts in which units fire")
    ] = None,
    json_file: Annotated[
        Optional[Path],
        typer.Option("--json", help="where to write it for circuit-tracer's or Neuronpedia's page"),
    ] = None,
    html: Annotated[
        Optional[Path], typer.Option(help="where to write it as one page that opens from disk")
    ] = None,
    start_units: Annotated[
        bool,
        typer.Option("--start-units", help="make units at the start token nodes, not one a layer"),
    ] = False,
    bos: Bos = "auto",
    trust_remote_code: Trust = False,
    device: Device = "cpu",
) -> None:
    """Find which embeddings, units and heads of MODEL made which, up to the next token.

    Attention patterns and the scales of norms are held; the rest is exact.
    """
    import torch

    from ..reading.contexts import contexts
    from ..reading.graph import attribution_graph, label, measure_effects, prune
    from ..reading.graph.build import require_request
    from ..reading.graph.export import write_graph
    from ..reading.graph.page import write_page
    from ..reading.graph.pruning import require_share
    from ..reading.graph.supernodes import group_similar, require_similarity
    from ..reading.model_parts import require_readable_family
    from ..storage.files import require_place
    from ..storage.loading import load_model, load_tokenizer
    from ..storage.model_files import read_config
    from ..text.inputs import find_longest_row
    from ..text.packing import read_token_ids
    from ..text.prompts import encode_prompt

    quieten()
    for file in (json_file, html):
        if file is not None:
            require_place(file)
    require_share("keep", keep)
    if group is not None:
        require_similarity(group)
    require_readable_family(read_config(model))
    tokenizer = load_tokenizer(model)
    text_format = make_text_format(False, bos, "text")
    ids = torch.tensor(encode_prompt(tokenizer, prompt, text_format), dtype=torch.int64)
    require_request(tokenizer, ids, target, against, nodes=nodes, rule=rule)
    text_ids = None
    if text is not None:
        text_ids = read_token_ids(tokenizer, [text], CONTEXT_LENGTH, CONTEXT_TOKENS, text_format)
    loaded = load_model(model, "float32", device, trust_remote_code)

    whole = attribution_graph(
        loaded,
        tokenizer,
        ids,
        target=target,
        against=against,
        nodes=nodes,
        heads=heads,
        rule=rule,
        start_units=start_units,
        progress=True,
    )
    pruned = prune(whole, keep)
    found = None
    if text_ids is not None:
        longest = find_longest_row(loaded) or CONTEXT_LENGTH
        found = contexts(loaded, text_ids[:, :longest].split(CONTEXT_ROWS))
    pruned = measure_effects(label(pruned, loaded, tokenizer, found), loaded)
    if group is not None:
        pruned = group_similar(pruned, loaded, group)

    if json_file is not None:
        write_graph(json_file, pruned)
    if html is not None:
        write_page(html, pruned)
    _print_graph(pruned, whole)


def _print_graph(graph: Graph, whole: Graph) -> None:
    """Print what ``graph``, pruned from ``whole``, says: figures, and its most influential
    nodes."""
    from rich.markup import escape

    from ..reading.graph import influences, score

    shown = [
        f"{node.name!r} {probability:.1%}"
        for node, probability in zip(graph.nodes, graph.probabilities, strict=False)
    ]
    against = "the mean of all logits" if graph.against is None else f"token {graph.against}"
    typer.echo(f"next, less {against}: " + ", ".join(shown))
    typer.echo(f"held: {', '.join(graph.held)}; rule: {graph.rule}")
    strict = score(graph)
    dropped = score(graph, elsewhere=False)
    typer.echo(
        f"{len(graph.nodes)} of {len(whole.nodes)} nodes, "
        f"{int((graph.edges != 0).sum())} of {int((whole.edges != 0).sum())} edges; "
        f"largest rounding {whole.rounding():.1e}, remainders {whole.remainder_share():.1%}"
    )
    typer.echo(
        f"replacement {strict.replacement:.3f}, completeness {strict.completeness:.3f} "
        f"({dropped.replacement:.3f}, {dropped.completeness:.3f} without what is left out)"
    )

    influence = influences(graph)
    rows: list[list[str]] = []
    for place in influence.argsort(descending=True).tolist():
        node = graph.nodes[place]
        if node.kind not in ("unit", "head"):
            continue
        if len(rows) == TABLE_ROWS:
            break
        token = f"{node.position} {graph.tokens[node.position]!r}"
        rows.append(
            [
                str(node.layer),
                escape(token),
                node.name,
                f"{node.value:.3g}",
                f"{influence[place]:.3f}",
                "" if math.isnan(graph.effects[place]) else f"{graph.effects[place]:+.2g}",
                escape(_list_inputs(graph, place)),
                escape(graph.labels[place]),
            ]
        )
    columns = ["layer", "token", "unit", "value", "influence", "without", "inputs", "promotes"]
    print_table(columns, rows)
    typer.echo("without: the first logit's change, to first order, if the unit wrote nothing")


def _list_inputs(graph: Graph, place: int) -> str:
    """The largest inputs of the node at ``place``, with what each adds."""
    row = graph.edges[place]
    parts = []
    for source in row.abs().argsort(descending=True)[:INPUTS].tolist():
        if row[source]:
            node = graph.nodes[source]
            where = repr(node.name) if node.kind == "embedding" else f"{node.layer}:{node.name}"
            parts.append(f"{where} {row[source]:+.2g}")
    return ", ".join(parts)
