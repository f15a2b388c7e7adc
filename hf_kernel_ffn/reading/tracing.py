"""One forward pass over a prompt, kept as what every FFN and every attention head wrote."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.record import Readout
from ..compat import get_attention_implementation, run_with_cache, set_attention_implementation
from ..text.prediction import require_head
from ..text.row_frame import encode_once
from .model_parts import (
    count_key_value_heads,
    decode_tokens,
    ffn_readout,
    get_attention,
    get_blocks,
    get_embedding_weight,
    get_output_projection,
    get_projection_weight,
    get_qkv_names,
    list_ffn_paths,
)

POSITIONS = 64
"""Of a longer prompt, the last so many positions are read unless others are asked for."""
CHUNK = 256
"""Positions that go through the model together."""


@dataclass(eq=False)
class Trace:
    """A forward pass over T tokens, of which P ``positions`` are kept; hidden_size d.

    Tensors are in the model's dtype. Records are computed when they are first asked for and then
    remembered: after an edit of the model, trace it again.
    """

    model: PreTrainedModel
    ids: Tensor
    """(T,) int64."""
    tokens: list[str]
    """The ids as text."""
    positions: list[int]
    """The positions kept, ascending."""
    embedding: Tensor
    """(P, d): the residual stream before the first block."""
    ffn_inputs: dict[str, Tensor]
    """(P, d) by the FFN's path, in layer order."""
    states: list[Tensor]
    """(P, d) per layer: the residual stream after the block."""
    attention: list[Tensor]
    """(heads, P, T) per layer: the weights of every head."""
    values: list[Tensor]
    """(key-value heads, T, head_dim) per layer: what each head reads at each token, before its
    output projection."""
    logits: Tensor
    """(P, vocabulary)."""
    _records: dict[str, Readout] = field(default_factory=dict, init=False, repr=False)
    """Records of FFNs by path, as far as they have been asked for."""

    def at(self, position: int) -> int:
        """The place of ``position`` (negative: from the end) among those kept.

        Raises:
            InputError: it was not kept.
        """
        place = position + len(self.ids) if position < 0 else position
        if place not in self.positions:
            raise InputError(
                f"found position {position}, expected one of those kept: "
                f"{_format_ranges(self.positions)}"
            )
        return self.positions.index(place)

    def ffn(self, path: str) -> Readout:
        """The record of the FFN at ``path``, coefficients (P, prototypes).

        Raises:
            InputError: there is no FFN at ``path``.
        """
        if path not in self.ffn_inputs:
            raise InputError(f"found no FFN {path!r}, expected one of {', '.join(self.ffn_inputs)}")
        if path not in self._records:
            self._records[path] = ffn_readout(self.model, path, self.ffn_inputs[path])
        return self._records[path]

    def head(self, layer: int, head: int, position: int) -> Readout:
        """The record of one attention head at ``position``: convex, coefficients (1, T), named by
        tokens.

        The bias of the output projection, which all heads of a block have in common, is left out.
        """
        groups = self.attention[layer].shape[0] // self.values[layer].shape[0]
        values = self.values[layer][head // groups]
        head_dim = values.shape[1]

        output = get_projection_weight(get_output_projection(self.model, layer))
        output_of_head = output[:, head * head_dim : (head + 1) * head_dim]
        weights = self.attention[layer][head, self.at(position)][None].to(values.dtype)
        names = tuple(f"{number} {token}" for number, token in enumerate(self.tokens))
        return Readout(
            coefficients=weights,
            dictionary=values @ output_of_head.T,
            bias=None,
            shares=weights,
            intensity=weights.new_ones(1),
            names=names,
        )


@torch.no_grad()
def trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Tensor,
    positions: Sequence[int] | None = None,
) -> Trace:
    """Run ``model`` (a causal language model, stock or converted) over ``text`` and keep what was
    written.

    The prompt goes through in chunks with a cache: memory grows with T by the keys and values
    alone, with P by the rest.

    Args:
        text: the prompt, or its token ids (T,).
        positions: where to read, negative ones from the end; None: everywhere, or the last
            :data:`POSITIONS` of a longer prompt.

    Raises:
        InputError: the prompt has no token, or a position is outside of it; the model is a bare
            one.
    """
    require_head(model)
    ids = tokenize_prompt(tokenizer, text)
    kept = _choose_positions(len(ids), positions)
    ids = ids.to(get_embedding_weight(model).device)
    pieces = _run_in_chunks(model.eval(), ids, kept)

    paths = list_ffn_paths(model)
    layers = range(len(paths))
    heads = count_key_value_heads(model)
    return Trace(
        model=model,
        ids=ids,
        tokens=[decode_tokens(tokenizer, [number]) for number in ids.tolist()],
        positions=kept,
        embedding=pieces["embedding", 0],
        ffn_inputs={path: pieces["ffn", layer] for layer, path in enumerate(paths)},
        states=[pieces["state", layer] for layer in layers],
        attention=[pieces["attention", layer] for layer in layers],
        values=[
            pieces["values", layer][0].unflatten(-1, (heads, -1)).transpose(0, 1)
            for layer in layers
        ],
        logits=pieces["logits", 0],
    )


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, text: str | Tensor) -> Tensor:
    """(T,) token ids of ``text``, which may be token ids already. InputError if there are none."""
    ids = torch.as_tensor(encode_once(tokenizer, text) if isinstance(text, str) else text).flatten()
    if not len(ids):
        raise InputError("found a prompt without a token, expected at least one")
    return ids


def list_last_positions(length: int) -> list[int]:
    """The positions of a prompt of ``length`` tokens that are read unless others are asked for."""
    return list(range(max(0, length - POSITIONS), length))


def _choose_positions(length: int, positions: Sequence[int] | None) -> list[int]:
    """Ascending positions from the start, each once; InputError if one is outside of the prompt."""
    if positions is None:
        return list_last_positions(length)
    outside = [position for position in positions if not -length <= position < length]
    if outside:
        raise InputError(
            f"found positions {outside}, expected numbers from {-length} to {length - 1}"
        )
    return sorted({position % length for position in positions})


Pieces = dict[tuple[str, int], list[Tensor]]
"""Parts of a pass, one per chunk, by what they are and by layer."""


def _run_in_chunks(
    model: PreTrainedModel, ids: Tensor, positions: list[int]
) -> dict[tuple[str, int], Tensor]:
    """What the hooks collect over ``ids`` (T,), at ``positions``; the values at every token."""
    pieces: Pieces = defaultdict(list)
    cache = None
    with _collect_pieces(model, pieces), use_eager_attention(model):
        for start in range(0, len(ids), CHUNK):
            logits, cache = run_with_cache(model, ids[None, start : start + CHUNK], cache)
            pieces["logits", 0].append(logits[0])
            _keep_positions(pieces, positions, start, len(ids))
    return {
        (what, layer): torch.cat(parts, 1 if what in ("attention", "values") else 0)
        for (what, layer), parts in pieces.items()
    }


def _keep_positions(pieces: Pieces, positions: list[int], start: int, length: int) -> None:
    """Cut what the chunk from ``start`` has added to ``pieces`` down to ``positions``."""
    end = min(length, start + CHUNK)
    inside = torch.tensor(
        [position - start for position in positions if start <= position < end],
        dtype=torch.int64,
        device=pieces["logits", 0][-1].device,
    )
    for (what, _), parts in pieces.items():
        if what == "attention":
            # A sliding window leaves out the oldest keys; a later chunk has more of them.
            rows = parts[-1][:, inside]
            before = end - rows.shape[-1]
            parts[-1] = nn.functional.pad(rows, (before, length - end))
        elif what != "values":
            parts[-1] = parts[-1][inside]


@contextmanager
def _collect_pieces(model: PreTrainedModel, pieces: Pieces) -> Iterator[None]:
    """Append each chunk's parts of the pass to ``pieces`` while the context is open."""
    hooks = []

    def collect_input(module: nn.Module, what: str, layer: int) -> None:
        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            pieces[what, layer].append(states[0])

        hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))

    def collect_output(
        module: nn.Module, what: str, layer: int, select: Callable[..., Tensor]
    ) -> None:
        def keep(module: nn.Module, args: tuple, output: object) -> None:
            pieces[what, layer].append(select(output))

        hooks.append(module.register_forward_hook(keep))

    qkv = get_qkv_names(model)
    select_values = _select_last_third if len(qkv) == 1 else _select_all
    blocks = get_blocks(model)
    try:
        collect_input(blocks[0], "embedding", 0)
        for layer, path in enumerate(list_ffn_paths(model)):
            attention = get_attention(model, layer)
            collect_input(model.base_model.get_submodule(path), "ffn", layer)
            collect_output(blocks[layer], "state", layer, _select_states)
            collect_output(attention, "attention", layer, _select_attention_weights)
            collect_output(attention.get_submodule(qkv[-1]), "values", layer, select_values)
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _select_states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """(T, d) of a block's output, which may have more than the states."""
    states = output[0] if isinstance(output, tuple) else output
    return states[0]


def _select_attention_weights(output: tuple[Tensor, Tensor]) -> Tensor:
    """(heads, T, T) of an attention module's output."""
    return output[1][0]


def _select_last_third(output: Tensor) -> Tensor:
    """The values of a projection that stacks queries, keys and values."""
    return output.chunk(3, -1)[-1]


def _select_all(output: Tensor) -> Tensor:
    """The values of a projection to values alone."""
    return output


@contextmanager
def use_eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Make attention return its weights while the context is open."""
    before = get_attention_implementation(model.config)
    set_attention_implementation(model.config, "eager")
    try:
        yield
    finally:
        set_attention_implementation(model.config, before)


def _format_ranges(numbers: list[int]) -> str:
    """``[3, 4, 5, 9]`` as ``3-5, 9``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
