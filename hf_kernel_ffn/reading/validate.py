"""Check by numbers what a family's entry says by names: on one model, with a short input."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from ..families.hooks import capture_ffn_inputs_and_outputs, capture_inputs_and_outputs
from ..families.lookup import StockFFN, find_stock_ffns
from ..families.registry import get_architecture_of_model
from ..families.table import Architecture
from ..families.weights import read_stock_weights, read_teacher_readout
from ..text.inputs import find_longest_row, make_forward_arguments, make_random_inputs
from .attribution import logit_split
from .model_parts import (
    get_attention,
    get_blocks,
    get_embedding_weight,
    get_final_norm,
    get_layer_number,
    get_output_projection,
)
from .rows import Rows
from .tracing import Trace, trace

TOLERANCE = 1e-3
"""Largest relative error that passes for rounding; float32 models stay below a hundredth of it."""
TOKENS = 24
"""Tokens of the prompt that is traced: more than the sliding windows of test models."""

ATTENTION = ("attention", "qkv", "attention_out")
"""What an entry has to describe for its heads to be read."""
STREAM = (*ATTENTION, "ffn_norm", "final_norm")
"""What it has to describe for the residual stream to be split. Entries leave ``ffn_norm`` out
where a norm stands on what is written, as the parts do not add up then."""


class Check(NamedTuple):
    """One thing that a family's entry says, and whether it is so."""

    claim: str
    error: float | None
    """Relative to the size of what is compared; None if nothing could be compared."""
    ok: bool | None
    """None if the entry does not describe it."""
    reason: str
    """Why it was not compared, or how it failed; empty if all is well."""


@torch.no_grad()
def check_family(model: PreTrainedModel, seed: int = 0) -> Rows[Check]:
    """Check the entry that describes the stock ``model``, a row for each claim.

    Args:
        seed: of the random inputs.

    Raises:
        InputError: the model is converted, quantised, or of no known family, or an FFN is not
            where the entry says.
    """
    family = get_architecture_of_model(model)
    model.eval()
    ffns = find_stock_ffns(model, family)
    checks = Rows[Check]()
    checks += _check_ffns(model, family, ffns, seed)

    undescribed = _find_undescribed(model, family, ATTENTION)
    passed = None if undescribed else _trace_random_tokens(model, seed)
    claim = "the heads and their bias are what attention writes"
    if passed is None:
        checks.append(Check(claim, None, None, undescribed))
    else:
        checks.append(_judge(claim, _measure_attention_error(passed)))
    checks += _check_stream(model, family, passed)
    return checks


def _judge(claim: str, error: float) -> Check:
    """The row of a claim that was compared."""
    ok = error <= TOLERANCE
    return Check(claim, error, ok, "" if ok else f"expected an error below {TOLERANCE:g}")


def _find_undescribed(model: PreTrainedModel, family: Architecture, parts: tuple[str, ...]) -> str:
    """Why ``parts`` of the entry cannot be checked on ``model``; empty if they can."""
    missing = [part for part in parts if getattr(family, part) is None]
    if missing:
        return f"not described: {', '.join(missing)}"
    if model.get_output_embeddings() is None:
        return "the model has no unembedding: load it as a causal language model"
    return ""


def _check_ffns(
    model: PreTrainedModel, family: Architecture, ffns: dict[str, StockFFN], seed: int
) -> Rows[Check]:
    """What the entry says of the FFNs and of the norms before them."""
    base = model.base_model
    norms = {path: norm for path, ffn in ffns.items() if (norm := ffn.norm(base)) is not None}
    inputs = make_random_inputs(model, TOKENS, seed)
    with (
        capture_ffn_inputs_and_outputs(base, ffns) as captured,
        capture_inputs_and_outputs(norms) as captured_norms,
    ):
        base(**make_forward_arguments(base, inputs))

    checks = Rows[Check]()
    record_errors = []
    norm_errors = []
    for path, (states, written) in captured.items():
        record = read_teacher_readout(read_stock_weights(model, ffns[path]), states)
        record_errors.append(_compare(record.output(), written))
        if path in captured_norms:
            norm_errors.append(_compare(captured_norms[path][1].flatten(0, -2), states))

    claim = f"the records of the {len(ffns)} FFNs sum to what these write"
    if record_errors:
        checks.append(_judge(claim, max(record_errors)))
    else:
        checks.append(Check(claim, None, False, "no input came to any of them"))
    claim = "the FFNs read what their norm writes"
    if norm_errors:
        checks.append(_judge(claim, max(norm_errors)))
    else:
        checks.append(Check(claim, None, None, "not described: ffn_norm"))
    return checks


def _check_stream(
    model: PreTrainedModel, family: Architecture, passed: Trace | None
) -> Rows[Check]:
    """What the entry says of the residual stream and of the logits."""
    checks = Rows[Check]()
    undescribed = _find_undescribed(model, family, STREAM)
    claim = "the residual stream is the embedding and what attention and FFNs write"
    if passed is None or undescribed:
        checks.append(Check(claim, None, None, undescribed))
    else:
        checks.append(_judge(claim, _measure_stream_error(passed)))

    claim = "the unembedding reads what the final norm writes"
    undescribed_norm = _find_undescribed(model, family, ("final_norm",))
    if undescribed_norm:
        checks.append(Check(claim, None, None, undescribed_norm))
    else:
        checks.append(_judge(claim, _measure_final_norm_error(model)))

    claim = "a logit is the sum of its parts"
    if passed is None or undescribed:
        checks.append(Check(claim, None, None, undescribed))
    else:
        checks.append(_check_logit_split(claim, passed))
    return checks


def _check_logit_split(claim: str, passed: Trace) -> Check:
    """Split the likeliest token's logit at the end of ``passed``."""
    try:
        split = logit_split(passed)
    except InputError as error:
        return Check(claim, None, False, str(error))
    return _judge(claim, abs(split.remainder) / abs(split.parts[0].amount))


def _measure_final_norm_error(model: PreTrainedModel) -> float:
    """Difference between the unembedding's input and the final norm of what the last block
    wrote."""
    head = cast(nn.Module, model.get_output_embeddings())
    modules = {"block": get_blocks(model)[-1], "head": head}
    ids = _make_ids(model, seed=0)[None].to(get_embedding_weight(model).device)
    with capture_inputs_and_outputs(modules) as captured:
        model(input_ids=ids, use_cache=False)
    written = captured["block"][1]
    states = written[0] if isinstance(written, tuple) else written
    return _compare(get_final_norm(model)(states), captured["head"][0])


class _TokenNumbers:
    """Stands for a tokenizer where tokens need no text."""

    def decode(self, ids: list[int]) -> str:
        """The ids themselves."""
        return " ".join(map(str, ids))


def _make_ids(model: PreTrainedModel, seed: int) -> Tensor:
    """(TOKENS or fewer,) random token ids."""
    length = min(TOKENS, find_longest_row(model) or TOKENS)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(get_embedding_weight(model)), (length,), generator=generator)


def _trace_random_tokens(model: PreTrainedModel, seed: int) -> Trace:
    """A pass over random tokens, of which the first, one in the middle and the last are kept."""
    ids = _make_ids(model, seed)
    tokenizer = cast(PreTrainedTokenizerBase, _TokenNumbers())
    return trace(model, tokenizer, ids, [0, len(ids) // 2, -1])


def _measure_attention_error(passed: Trace) -> float:
    """Largest error of the heads' sum, over layers and positions kept."""
    model = passed.model
    modules = [get_attention(model, layer) for layer in range(len(passed.attention))]
    written = _run_attentions(model, modules, passed.ids)
    return max(
        _compare(_sum_heads(passed, layer), written[layer][passed.positions])
        for layer in range(len(modules))
    )


def _run_attentions(model: PreTrainedModel, modules: list[nn.Module], ids: Tensor) -> list[Tensor]:
    """(T, d) that each attention module writes over ``ids`` (T,)."""
    written: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> None:
        written.append(output[0][0].clone())

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        model.base_model(input_ids=ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return written


def _sum_heads(passed: Trace, layer: int) -> Tensor:
    """(P, d) what the heads of block ``layer`` and their bias write."""
    bias = cast(Tensor | None, get_output_projection(passed.model, layer).bias)
    heads = range(len(passed.attention[layer]))
    rows = [
        torch.stack([passed.head(layer, head, position).output()[0] for head in heads]).sum(0)
        for position in passed.positions
    ]
    written = torch.stack(rows)
    return written if bias is None else written + bias


def _measure_stream_error(passed: Trace) -> float:
    """Largest error of what each block adds to the residual stream, over layers and positions
    kept."""
    before = passed.embedding
    errors = []
    for path in passed.ffn_inputs:
        layer = get_layer_number(path)
        summed = before + _sum_heads(passed, layer) + passed.ffn(path).output()
        errors.append(_compare(summed, passed.states[layer]))
        before = passed.states[layer]
    return max(errors)


def _compare(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected number."""
    difference = (found.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp_min(1e-30)).item()
