"""One forward pass over a prompt, kept as what every FFN and every attention head wrote."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.record import Readout
from ..compat import get_attention_implementation, run_with_cache, set_attention_implementation
from ..families.lookup import find_ffn_paths, find_stock_ffn
from ..families.registry import get_architecture, get_architecture_of_model
from ..families.table import Architecture
from ..families.weights import read_stock_weights, read_teacher_readout

POSITIONS = 64
"""Of a longer prompt, the last so many positions are read unless others are asked for."""
CHUNK = 256
"""Positions that go through the model together."""


class Trace(NamedTuple):
    """A forward pass over T tokens, of which P ``positions`` are kept; L layers, hidden_size d. All in the model's dtype."""

    model: Any
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
    """(key-value heads, T, head_dim) per layer: what each head reads at each token, before its output projection."""
    logits: Tensor
    """(P, vocabulary)."""

    def at(self, position: int) -> int:
        """The place of ``position`` (negative: from the end) among those kept; InputError if it is not."""
        place = position + len(self.ids) if position < 0 else position
        if place not in self.positions:
            raise InputError(
                f"found position {position}, expected one of those kept: {_ranges(self.positions)}"
            )
        return self.positions.index(place)

    def ffn(self, path: str) -> Readout:
        """The record of the FFN at ``path``, coefficients (P, prototypes)."""
        if path not in self.ffn_inputs:
            raise InputError(f"found no FFN {path!r}, expected one of {', '.join(self.ffn_inputs)}")
        return ffn_readout(self.model, path, self.ffn_inputs[path])

    def head(self, layer: int, head: int, position: int) -> Readout:
        """The record of one attention head at ``position``: coefficients (1, T), named by the tokens, convex. The bias of the
        heads' common output projection is in none of them."""
        output, groups = (
            output_projection(self.model, layer),
            self.attention[layer].shape[0] // self.values[layer].shape[0],
        )
        values = self.values[layer][head // groups]
        part = output[:, head * values.shape[1] : (head + 1) * values.shape[1]]
        weights = self.attention[layer][head, self.at(position)][None].to(values.dtype)
        names = tuple(f"{i} {token}" for i, token in enumerate(self.tokens))
        return Readout(weights, values @ part.T, None, weights, weights.new_ones(1), names)


def family_of(model: Any) -> Architecture:
    """The table's entry for a stock or converted ``model``; InputError if it is of no known family."""
    entry = getattr(model.config, "kernel_ffn", None)
    return get_architecture_of_model(model) if entry is None else get_architecture(entry["family"])


def described(model: Any, part: str) -> Any:
    """What the table's entry for ``model`` says of ``part`` (attention, qkv, …); InputError if it says nothing."""
    family = family_of(model)
    found = getattr(family, part)
    if found is None:
        raise InputError(
            f"found nothing on {part} in the entry for {family.model_type!r}, expected it for this reading: give it in the Architecture, "
            "if the family has such a part"
        )
    return found


def ffn_readout(model: Any, path: str, inputs: Tensor) -> Readout:
    """The record of the FFN at ``path`` (under the base model) at its ``inputs`` (..., hidden_size), whatever stands there: a
    kernel readout, the teacher's own FFN, or another module with a ``readout`` method."""
    ffn = model.base_model.get_submodule(path)
    if hasattr(ffn, "readout"):
        return ffn.readout(inputs)
    return read_teacher_readout(read_stock_weights(model, find_stock_ffn(model, path)), inputs)


def get_layer_number(path: str) -> int:
    """The number in an FFN's path."""
    return next(int(part) for part in path.split(".") if part.isdigit())


def unembedding(model: Any) -> Tensor:
    """(vocabulary, hidden_size): rows are the directions that the logits read off the normalised final state."""
    return model.get_output_embeddings().weight.detach()


def projection(linear: nn.Module) -> Tensor:
    """(out, in) of a ``Linear`` or ``Conv1D``."""
    weight: Any = linear.weight
    return weight.detach().T if isinstance(linear, Conv1D) else weight.detach()


def get_attention(model: Any, layer: int) -> nn.Module:
    """The attention module of block ``layer``."""
    return model.base_model.get_submodule(
        f"{family_of(model).layers}.{layer}.{described(model, 'attention')}"
    )


def output_projection(model: Any, layer: int) -> Tensor:
    """(hidden_size, heads · head_dim): how the heads of block ``layer`` write, side by side."""
    return projection(getattr(get_attention(model, layer), described(model, "attention_out")))


@torch.no_grad()
def trace(
    model: Any, tokenizer: Any, text: str | Tensor, positions: list[int] | None = None
) -> Trace:
    """Run ``model`` (a causal language model, stock or converted) over ``text`` and keep what was written.

    Args:
        text: the prompt, or its token ids (T,).
        positions: where to read, negative ones from the end; None: everywhere, or the last 64 of a longer prompt. The prompt
            goes through in chunks with a cache: memory grows with T by the keys and values alone, with P by the rest.

    Raises:
        InputError: the prompt has no token, or a position is outside of it.
    """
    ids = torch.as_tensor(tokenizer(text)["input_ids"] if isinstance(text, str) else text).flatten()
    count = len(ids)
    if not count:
        raise InputError("found a prompt without a token, expected at least one")
    wanted = range(max(0, count - POSITIONS), count) if positions is None else positions
    if any(not -count <= p < count for p in wanted):
        raise InputError(
            f"found positions {list(wanted)}, expected numbers from {-count} to {count - 1}"
        )
    kept = sorted({p % count for p in wanted})
    ids = ids.to(model.get_input_embeddings().weight.device)
    pieces: dict[tuple[str, Any], list[Tensor]] = defaultdict(list)
    cache = None
    with _hooks(model.eval(), pieces), _eager(model):
        for start in range(0, count, CHUNK):
            logits, cache = run_with_cache(model, ids[None, start : start + CHUNK], cache)
            pieces["logits", None].append(logits[0])
            inside = torch.tensor(
                [p - start for p in kept if start <= p < start + CHUNK],
                dtype=torch.int64,
                device=ids.device,
            )
            for (what, _), parts in pieces.items():
                if (
                    what == "attention"
                ):  # a sliding window leaves out the oldest keys, a later chunk has more of them
                    rows = parts[-1][:, inside]
                    seen = min(count, start + CHUNK)
                    parts[-1] = nn.functional.pad(rows, (seen - rows.shape[-1], count - seen))
                elif what != "values":
                    parts[-1] = parts[-1][inside]
    whole = {
        key: torch.cat(parts, 1 if key[0] in ("attention", "values") else 0)
        for key, parts in pieces.items()
    }
    family = family_of(model)
    paths = find_ffn_paths(model, family)
    layers = range(len(paths))
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    return Trace(
        model=model,
        ids=ids,
        tokens=[tokenizer.decode([i]) for i in ids.tolist()],
        positions=kept,
        embedding=whole["embedding", 0],
        ffn_inputs={path: whole["ffn", path] for path in paths},
        states=[whole["state", layer] for layer in layers],
        attention=[whole["attention", layer] for layer in layers],
        values=[
            whole["values", layer][0].unflatten(-1, (heads, -1)).transpose(0, 1) for layer in layers
        ],
        logits=whole["logits", None],
    )


@contextmanager
def _hooks(model: Any, pieces: dict[tuple[str, Any], list[Tensor]]) -> Iterator[None]:
    """Collect each chunk's parts of the pass in ``pieces``."""
    family = family_of(model)
    hooks = []

    def on_input(module: nn.Module, what: str, which: Any) -> None:
        def keep(module, args, kwargs):
            pieces[what, which].append((args[0] if args else kwargs["hidden_states"])[0])

        hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))

    def on_output(module: nn.Module, what: str, which: Any, take) -> None:
        hooks.append(
            module.register_forward_hook(
                lambda module, args, output: pieces[what, which].append(take(output))
            )
        )

    for layer, path in enumerate(find_ffn_paths(model, family)):
        block = model.base_model.get_submodule(f"{family.layers}.{layer}")
        attention = getattr(block, described(model, "attention"))
        if layer == 0:
            on_input(block, "embedding", 0)
        on_input(model.base_model.get_submodule(path), "ffn", path)
        on_output(
            block,
            "state",
            layer,
            lambda output: (output[0] if isinstance(output, tuple) else output)[0],
        )
        on_output(attention, "attention", layer, lambda output: output[1][0])
        qkv = described(model, "qkv")
        value = getattr(attention, qkv[-1])
        stacked = len(qkv) == 1
        on_output(
            value,
            "values",
            layer,
            (lambda output: output.chunk(3, -1)[-1]) if stacked else (lambda output: output),
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """The attention that returns its weights, while the context is open."""
    before = get_attention_implementation(model.config)
    set_attention_implementation(model.config, "eager")
    try:
        yield
    finally:
        set_attention_implementation(model.config, before)


def _ranges(numbers: list[int]) -> str:
    """``[3, 4, 5, 9]`` as ``3-5, 9``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
