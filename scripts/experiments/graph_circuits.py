"""Models as coefficients over dictionaries that can be changed, and the smallest circuit of a gap.

A pair is a unit at a token. A circuit keeps some pairs; all others have a mean: that over other
prompts of the same template at the same place (Wang et al. 2022, arXiv:2211.00593, §2.1), or that
over ordinary text. The start token is the same one in every prompt, so what its units do there is
their mean, and no pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_kernel_ffn.checkpoint_code.record import ReadableFFN
from hf_kernel_ffn.evaluation.baselines import TeacherFFN, Transcoder
from hf_kernel_ffn.families.lookup import find_stock_ffn
from hf_kernel_ffn.families.weights import read_stock_weights
from hf_kernel_ffn.reading.model_parts import has_tied_rows, list_ffn_paths

KEPT = 0.8
"""Share of the way from the means' gap to the prompt's that a circuit has to make."""
PATH = (torch.arange(8) + 0.5) / 8
"""Points between the means and the prompt's own coefficients at which gradients are taken."""
GROWTH = 1.3
"""From one size that is tried to the next."""
SIZES_AT_ONCE = 12


class Layer(NamedTuple):
    """An FFN as coefficients over a dictionary, both with gradients."""

    module: nn.Module
    coefficients: Callable[[Tensor], Tensor]
    dictionary: Tensor
    """(units, hidden_size)."""
    bias: Tensor | float
    skip: Callable[[Tensor], Tensor] | None
    """The linear map beside the mixture."""


class Asked(NamedTuple):
    """A prompt with a right and a wrong next token."""

    ids: Tensor
    """(T,)."""
    right: int
    wrong: int
    first: int
    """Where pairs begin: after the start token, if there is one."""


def read_layers(model: PreTrainedModel) -> list[Layer]:
    """The FFNs of ``model``, stock, converted or controls, whose unit of counting is the teacher's
    unit where rows are tied, and else the prototype."""
    layers = []
    for path in list_ffn_paths(model):
        ffn = model.base_model.get_submodule(path)
        if isinstance(ffn, ReadableFFN):
            layers.append(_read_readable(ffn, model.config.hidden_size))
            continue
        weights = read_stock_weights(model, find_stock_ffn(model, path))
        bias = 0.0 if weights.down_bias is None else weights.down_bias
        layers.append(Layer(ffn, weights.coefficients, weights.down, bias, None))
    return layers


def _read_readable(ffn: nn.Module, hidden_size: int) -> Layer:
    """A converted FFN, or a control."""
    record = ffn.readout(torch.zeros(1, hidden_size))
    bias = 0.0 if record.bias is None else record.bias.detach()
    dictionary = record.dictionary.detach()
    if isinstance(ffn, Transcoder):
        skip = None if record.skip is None else lambda x: ffn.readout(x).skip
        return Layer(ffn, lambda x: ffn.readout(x).coefficients, dictionary, bias, skip)
    if has_tied_rows(ffn) and not isinstance(ffn, TeacherFFN):
        dictionary = dictionary[: len(dictionary) // 2]
    return Layer(ffn, ffn.coefficients, dictionary, bias, getattr(ffn, "skip", None))


Change = Callable[[int, Tensor], Tensor]
"""(layer, coefficients (rows, T, units)) to other coefficients."""


@contextmanager
def changed(layers: list[Layer], change: Change) -> Iterator[None]:
    """Let ``change`` have its way with all coefficients while the context is open."""

    def make_hook(number: int, layer: Layer) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        def write(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            coefficients = change(number, layer.coefficients(args[0]))
            written = coefficients.to(output.dtype) @ layer.dictionary + layer.bias
            return written if layer.skip is None else written + layer.skip(args[0])

        return write

    handles = [
        layer.module.register_forward_hook(make_hook(number, layer))
        for number, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_text_means(
    model: PreTrainedModel, layers: list[Layer], ids: Tensor, first: int
) -> list[Tensor]:
    """(units,) the mean coefficients of every layer over ``ids`` (rows, length), from the token
    ``first`` of each row on."""
    sums: list[Tensor] = [torch.zeros(len(layer.dictionary)) for layer in layers]

    def add(number: int, coefficients: Tensor) -> Tensor:
        sums[number] += coefficients[:, first:].sum((0, 1))
        return coefficients

    with changed(layers, add):
        for rows in ids.split(4):
            model.base_model(input_ids=rows, use_cache=False)
    return [total / ids[:, first:].numel() for total in sums]


@torch.no_grad()
def measure_place_means(model: PreTrainedModel, layers: list[Layer], ids: Tensor) -> list[Tensor]:
    """(T, units) the mean coefficients of every layer at every place of prompts ``ids`` (prompts,
    T)."""
    means: list[Tensor] = [torch.empty(0)] * len(layers)

    def take(number: int, coefficients: Tensor) -> Tensor:
        means[number] = coefficients.mean(0)
        return coefficients

    with changed(layers, take):
        model.base_model(input_ids=ids, use_cache=False)
    return means


def measure_gaps(model: PreTrainedModel, ids: Tensor, asked: Asked) -> Tensor:
    """(rows,) the gap between the two logits after each row of ``ids`` (rows, T)."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits[:, asked.right] - logits[:, asked.wrong]


def measure_pairs(
    model: PreTrainedModel, layers: list[Layer], means: list[Tensor], asked: Asked
) -> list[Tensor]:
    """(T, units) of every layer: what each pair does for the gap, against its mean, to first order.

    That is gradient · (coefficient − mean), with the mean of the gradients at the points of
    ``PATH`` (Sundararajan et al. 2017, arXiv:1703.01365). They go through later layers, attention
    patterns and norms.
    """
    own: list[Tensor] = [torch.empty(0)] * len(layers)

    def keep_own(number: int, coefficients: Tensor) -> Tensor:
        own[number] = coefficients[0].detach()
        return coefficients

    with torch.no_grad(), changed(layers, keep_own):
        measure_gaps(model, asked.ids[None], asked)

    shares = PATH[:, None, None]
    held: list[Tensor] = [torch.empty(0)] * len(layers)

    def hold(number: int, coefficients: Tensor) -> Tensor:
        mixed = torch.lerp(means[number].expand_as(own[number]), own[number], shares)
        mixed[:, : asked.first] = own[number][: asked.first]
        held[number] = mixed.requires_grad_()
        # The gradient of what is written, by way of later layers too.
        return held[number] + (coefficients - coefficients.detach())

    with changed(layers, hold), torch.enable_grad():
        rows = asked.ids.expand(len(PATH), -1)
        gradients = torch.autograd.grad(measure_gaps(model, rows, asked).sum(), held)
    return [
        gradient.mean(0) * (coefficients - mean)
        for gradient, coefficients, mean in zip(gradients, own, means, strict=True)
    ]


def rank_pairs(effects: list[Tensor], first: int) -> list[Tensor]:
    """(T, units) int64 of every layer: the place of each pair by its effect, the largest first,
    and -1 before the token ``first``."""
    flat = torch.cat([each[first:].flatten() for each in effects])
    places = torch.empty(len(flat), dtype=torch.int64)
    places[flat.argsort(descending=True)] = torch.arange(len(flat))
    ranks = [torch.full(each.shape, -1) for each in effects]
    parts = places.split([each[first:].numel() for each in effects])
    for rank, part in zip(ranks, parts, strict=True):
        rank[first:] = part.view_as(rank[first:])
    return ranks


def list_sizes(largest: int) -> list[int]:
    """1, 2, 3, … and then each ``GROWTH`` times the one before, up to ``largest``."""
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(largest, max(sizes[-1] + 1, round(GROWTH * sizes[-1]))))
    return sizes


def count_circuit(
    model: PreTrainedModel, layers: list[Layer], means: list[Tensor], asked: Asked
) -> int | None:
    """The least number of pairs, by the order of their effects, with which at least ``KEPT`` of the
    gap is there; of the sizes of :func:`list_sizes`, the smallest first.

    None where the means alone have so much of it.
    """
    ranks = rank_pairs(measure_pairs(model, layers, means, asked), asked.first)

    @torch.no_grad()
    def keep(sizes: list[int]) -> Tensor:
        allowed_ranks = torch.tensor(sizes)[:, None, None]

        def cut(number: int, coefficients: Tensor) -> Tensor:
            return torch.where(ranks[number] < allowed_ranks, coefficients, means[number])

        with changed(layers, cut):
            return measure_gaps(model, asked.ids.expand(len(sizes), -1), asked)

    total = sum(rank[asked.first :].numel() for rank in ranks)
    nothing, everything = keep([0, total]).tolist()
    if nothing >= KEPT * everything:
        return None
    wanted = nothing + KEPT * (everything - nothing)
    sizes = list_sizes(total)
    for start in range(0, len(sizes), SIZES_AT_ONCE):
        tried = sizes[start : start + SIZES_AT_ONCE]
        for size, gap in zip(tried, keep(tried).tolist(), strict=True):
            if gap >= wanted:
                return size
    return total
