#!/usr/bin/env python3
"""Time, memory and exactness of one attribution graph.

    python scripts/benchmarks/graph_speed.py MODEL --text recipes/text/books-test.txt

Peak memory is that of the process: the model and the libraries are in it.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from hf_kernel_ffn.reading.graph import attribution_graph, prune, score
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.loading import load_model, load_tokenizer
from hf_kernel_ffn.text.packing import read_token_ids

KIB = 1024


def main(
    model: Annotated[str, typer.Argument(help="local folder or hub id, converted or stock")],
    text: Annotated[str, typer.Option(help="the prompt is its beginning")],
    tokens: Annotated[int, typer.Option(min=1, help="length of the prompt")] = 64,
    nodes: Annotated[int, typer.Option(min=1, help="units of the graph")] = 512,
    heads: Annotated[bool, typer.Option("--heads", help="make heads nodes too")] = False,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="where to write it")] = None,
) -> None:
    """Make one graph and print what it took."""
    tokenizer = load_tokenizer(model)
    ids = read_token_ids(tokenizer, [text], tokens, tokens)[0]
    loaded = load_model(model)
    start = time.perf_counter()
    graph = attribution_graph(loaded, tokenizer, ids, nodes=nodes, heads=heads)
    seconds = time.perf_counter() - start
    pruned = prune(graph)
    figures = {
        "model": Path(model).name,
        "tokens": tokens,
        "nodes": nodes,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB**2, 2),
        "rounding": graph.rounding(),
        "remainder_share": graph.remainder_share(),
        "scores": score(graph)._asdict(),
        "nodes_kept": len(pruned.nodes),
        "edges_kept": int((pruned.edges != 0).sum()),
        "scores_kept": score(pruned)._asdict(),
    }
    text_of_figures = json.dumps(figures, indent=1)
    typer.echo(text_of_figures)
    if json_file is not None:
        write_text(json_file, text_of_figures + "\n")


if __name__ == "__main__":
    typer.run(main)
