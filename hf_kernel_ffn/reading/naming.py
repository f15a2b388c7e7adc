"""Names for prototypes: what the output prototypes write, what the input prototypes listen for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .lens import TunedLens
from .model_parts import (
    count_key_value_heads,
    decode_tokens,
    ffn_readout,
    get_blocks,
    get_described,
    get_embedding_weight,
    get_final_norm,
    get_layer_number,
    get_qkv_weights,
    get_unembedding,
)
from .norms import find_attention_norms, measure_norm
from .rows import Rows
from .top_k import merge_top_k

CHUNK = 1024
"""Token embeddings that go through an FFN together."""
ROLES = ("query", "key", "value")
"""What a projection of a head is for, in the order in which a family's entry names them."""


class Written(NamedTuple):
    """The tokens whose logits a direction moves most, and by how much.

    The amounts are in logits per unit of the direction, the final norm's scale aside.
    """

    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]

    def __str__(self) -> str:
        return " ".join(repr(token) for token, _ in self.promoted)


@torch.no_grad()
def written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directions: Tensor,
    top: int = 5,
    *,
    lens: TunedLens | None = None,
    layer: int | None = None,
) -> list[Written]:
    """Tell what each of ``directions`` does to the logits on the direct path.

    This is the logit lens on weights (Geva et al. 2022, arXiv:2203.14680).

    Args:
        directions: (n, hidden_size), such as the rows of a record's dictionary.
        top: tokens on either side.
        lens: sends the directions through the tuned lens's map of ``layer`` first.
        layer: the block that writes the directions; None: the first.
    """
    directions = directions.float()
    if lens is not None:
        directions = lens.directions(layer or 0, directions)
    read_directions = measure_norm(get_final_norm(model), directions).numerator(directions)
    unembedding = get_unembedding(model).float()

    rows = []
    for chunk in read_directions.split(CHUNK):
        logits = chunk @ unembedding.T
        highest = logits.topk(top)
        lowest = logits.topk(top, largest=False)
        for row in range(len(chunk)):
            rows.append(
                Written(
                    _name_tokens(tokenizer, highest.indices[row], highest.values[row]),
                    _name_tokens(tokenizer, lowest.indices[row], lowest.values[row]),
                )
            )
    return rows


def _name_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: Tensor, values: Tensor
) -> list[tuple[str, float]]:
    """The tokens ``ids`` (n,) as text, each with its value."""
    texts = [decode_tokens(tokenizer, [number]) for number in ids.tolist()]
    return list(zip(texts, values.tolist(), strict=True))


class Aligned(NamedTuple):
    """How far one output prototype points along one feature of a user's basis."""

    prototype: str
    feature: str
    cosine: float


def aligned(
    directions: Tensor, names: Sequence[str], basis: Tensor, features: list[str], *, top: int = 1
) -> Rows[Aligned]:
    """Find for each of ``directions`` the rows of a feature ``basis`` with the largest |cosine|.

    Args:
        directions: (n, hidden_size).
        names: of the directions.
        basis: (features, hidden_size), such as the decoder of a sparse autoencoder, or probes.
        features: names of the basis's rows.
        top: rows for each direction.

    Returns:
        ``top`` rows for each direction, most aligned first.
    """
    unit_directions = nn.functional.normalize(directions.float(), dim=-1)
    unit_basis = nn.functional.normalize(basis.float(), dim=-1)
    cosines = unit_directions @ unit_basis.T

    table = Rows[Aligned]()
    for name, row in zip(names, cosines, strict=True):
        for feature in row.abs().topk(min(top, len(features))).indices.tolist():
            table.append(Aligned(name, features[feature], row[feature].item()))
    table.sort(key=lambda entry: -abs(entry.cosine))
    return table


class Feeds(NamedTuple):
    """A later head's projection that listens to one output prototype."""

    prototype: str
    layer: int
    head: int
    role: str
    """query, key or value."""
    gain: float
    """‖W v̂‖ over what a random direction gets, ‖W‖_F/√hidden_size. v̂ is the prototype
    as the norm before that attention hands it on, at length one."""


@torch.no_grad()
def feeds(
    model: PreTrainedModel, layer: int, directions: Tensor, names: Sequence[str], *, top: int = 3
) -> Rows[Feeds]:
    """Find the projections of later heads that read each of ``directions`` most.

    These are the composition scores of Elhage et al. 2021, for one direction.

    Args:
        layer: the block that writes the directions; only later ones are looked at.
        directions: (n, hidden_size).
        names: of the directions.
        top: query, key or value projections for each direction.
    """
    places: list[tuple[int, int, str]] = []
    gains: list[Tensor] = []
    norms = find_attention_norms(model)
    groups = count_key_value_heads(model)
    heads = {"query": model.config.num_attention_heads, "key": groups, "value": groups}
    for later in range(layer + 1, len(norms)):
        norm = norms[later]
        handed_on = directions.float()
        if norm is not None:
            handed_on = measure_norm(norm, handed_on).numerator(handed_on)
        unit = nn.functional.normalize(handed_on, dim=-1)

        for role, weight in zip(ROLES, get_qkv_weights(model, later), strict=True):
            for head, projection in enumerate(weight.float().chunk(heads[role])):
                by_chance = projection.norm() / projection.shape[1] ** 0.5
                places.append((later, head, role))
                gains.append((unit @ projection.T).norm(dim=-1) / by_chance)

    table = Rows[Feeds]()
    if not places:
        return table
    best = torch.stack(gains, -1).topk(min(top, len(places)))
    for row, name in enumerate(names):
        for gain, place in zip(best.values[row].tolist(), best.indices[row].tolist(), strict=True):
            later, head, role = places[place]
            table.append(Feeds(name, later, head, role, gain))
    return table


@torch.no_grad()
def nearest_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str, top: int = 5
) -> list[list[tuple[str, float]]]:
    """Find for each prototype or unit of the FFN at ``path`` the ``top`` tokens that fire it most.

    The tokens' embeddings go through the FFN's own norm, and those with the largest |coefficient|
    are given with it: nearest in the layer's own kernel. What attention adds is left out, so this
    tells more of early layers than of late ones.
    """
    block = get_blocks(model)[get_layer_number(path)]
    norm = block.get_submodule(get_described(model, "ffn_norm"))

    best: tuple[Tensor, ...] = ()
    for number, embeddings in enumerate(get_embedding_weight(model).split(CHUNK)):
        coefficients = ffn_readout(model, path, norm(embeddings)).coefficients.float().T
        sizes, places = coefficients.abs().topk(min(top, coefficients.shape[1]))
        chunk = (sizes, places + number * CHUNK, coefficients.gather(1, places))
        best = merge_top_k(best, chunk, top) if best else chunk

    _, ids, values = best
    return [
        _name_tokens(tokenizer, ids_of_row, values_of_row)
        for ids_of_row, values_of_row in zip(ids, values, strict=True)
    ]
