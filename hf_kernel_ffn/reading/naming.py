"""Names for prototypes: what the output prototypes write, what the input prototypes listen for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attribution import final_norm
from .lens import TunedLens
from .rows import Rows
from .tracing import (
    described,
    family_of,
    ffn_readout,
    get_attention,
    get_layer_number,
    projection,
    unembedding,
)

CHUNK = 1024
"""Token embeddings that go through an FFN together."""


class Written(NamedTuple):
    """The tokens whose logits a direction moves most, with by how much, in logits per unit of the direction, the final
    norm's scale aside."""

    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]

    def __str__(self) -> str:
        return " ".join(repr(token) for token, _ in self.promoted)


@torch.no_grad()
def written(
    model: Any,
    tokenizer: Any,
    directions: Tensor,
    top: int = 5,
    lens: TunedLens | None = None,
    layer: int | None = None,
) -> list[Written]:
    """What each of ``directions`` (n, hidden_size), such as a record's dictionary rows, does to the logits on the direct path: the
    logit lens on weights (Geva et al. 2022, arXiv:2203.14680). With ``lens`` and the ``layer`` that writes, by the tuned lens's map
    of that layer."""
    directions = (
        directions.float() if lens is None else lens.directions(layer or 0, directions.float())
    )
    norm: Any = final_norm(model)
    gain = getattr(norm, "weight", None)
    if isinstance(norm, nn.LayerNorm):
        directions = directions - directions.mean(-1, keepdim=True)
    scaled = directions if gain is None else directions * gain.float()
    found = []
    for some in scaled.split(CHUNK):
        logits = some @ unembedding(model).float().T
        sides = [logits.topk(top, largest=largest) for largest in (True, False)]
        for row in range(len(some)):
            lists = [
                list(zip(_texts(tokenizer, side.indices[row]), side.values[row].tolist()))
                for side in sides
            ]
            found.append(Written(*lists))
    return found


def _texts(tokenizer: Any, ids: Tensor) -> list[str]:
    return [tokenizer.decode([i]) for i in ids.tolist()]


class Aligned(NamedTuple):
    """How far one output prototype points along one feature of a user's basis."""

    prototype: str
    feature: str
    cosine: float


def aligned(
    directions: Tensor, names: tuple, basis: Tensor, features: list[str], top: int = 1
) -> Rows[Aligned]:
    """For each of ``directions`` (n, hidden_size), called ``names``, the ``top`` rows of a feature ``basis`` (features, hidden_size)
    with the largest |cosine|, such as the decoder of a sparse autoencoder or probe directions; most aligned first."""
    cosine = (
        nn.functional.normalize(directions.float(), dim=-1)
        @ nn.functional.normalize(basis.float(), dim=-1).T
    )
    found = Rows[Aligned]()
    for name, row in zip(names, cosine):
        found += [
            Aligned(name, features[i], row[i].item())
            for i in row.abs().topk(min(top, len(features))).indices.tolist()
        ]
    found.sort(key=lambda entry: -abs(entry.cosine))
    return found


class Feeds(NamedTuple):
    """A later head's projection that listens to one output prototype."""

    prototype: str
    layer: int
    head: int
    role: str
    """query, key or value."""
    gain: float
    """‖W v̂‖ over what a random direction gets, ‖W‖_F/√hidden_size; v̂ the prototype through the gain of that block's norm."""


@torch.no_grad()
def feeds(model: Any, layer: int, directions: Tensor, names: tuple, top: int = 3) -> Rows[Feeds]:
    """For each of ``directions`` (n, hidden_size), written by block ``layer`` and called ``names``, the ``top`` query, key and value
    projections of later blocks that read it most (the composition scores of Elhage et al. 2021, for one direction)."""
    family, config = family_of(model), model.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    places, gains = [], []
    count = len(model.base_model.get_submodule(family.layers))
    for later in range(layer + 1, count):
        block = model.base_model.get_submodule(f"{family.layers}.{later}")
        norm: Any = next(
            module
            for name, module in block.named_children()
            if "norm" in name or name.startswith("ln")
        )
        through = nn.functional.normalize(directions.float() * norm.weight.detach().float(), dim=-1)
        attention = get_attention(model, later)
        weights = [projection(getattr(attention, name)) for name in described(model, "qkv")]
        for role, weight in zip(
            ("query", "key", "value"), weights if len(weights) == 3 else weights[0].chunk(3)
        ):
            for head, part in enumerate(weight.float().chunk(heads if role == "query" else groups)):
                places.append((later, head, role))
                gains.append((through @ part.T).norm(dim=-1) / (part.norm() / part.shape[1] ** 0.5))
    found = Rows[Feeds]()
    if places:
        best = torch.stack(gains, -1).topk(min(top, len(places)))
        for name, values, indices in zip(names, best.values.tolist(), best.indices.tolist()):
            for value, (later, head, role) in zip(values, (places[i] for i in indices)):
                found.append(Feeds(name, later, head, role, value))
    return found


@torch.no_grad()
def nearest_tokens(
    model: Any, tokenizer: Any, path: str, top: int = 5
) -> list[list[tuple[str, float]]]:
    """For each prototype or unit of the FFN at ``path`` the ``top`` tokens whose embeddings, sent through the FFN's own norm, have
    the largest |coefficient|, with the coefficient: nearest in the layer's own kernel. What attention adds is left out, so
    this tells more of early layers than of late ones."""
    family = family_of(model)
    norm = model.base_model.get_submodule(
        f"{family.layers}.{get_layer_number(path)}.{described(model, 'ffn_norm')}"
    )
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for start, some in enumerate(model.get_input_embeddings().weight.detach().split(CHUNK)):
        c = ffn_readout(model, path, norm(some)).coefficients.float().T
        values, places = c.abs().topk(min(top, c.shape[1]))
        part = (values, places + start * CHUNK, c.gather(1, places))
        if best is not None:
            part = tuple(torch.cat(pair, 1) for pair in zip(best, part))  # type: ignore[assignment]
        kept = part[0].topk(min(top, part[0].shape[1])).indices
        best = tuple(tensor.gather(1, kept) for tensor in part)  # type: ignore[assignment]
    assert best is not None
    return [
        list(zip(_texts(tokenizer, ids), values.tolist())) for ids, values in zip(best[1], best[2])
    ]
