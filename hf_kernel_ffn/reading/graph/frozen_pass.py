"""One forward pass that is linear between nodes: everything but the FFNs, held where it was.

The model runs once under hooks. What is no node and not linear is held at its value on the prompt:
queries and keys, so attention patterns, and the scales of norms. What an FFN writes, and an
embedding, is a leaf; the linear map that some readouts have beside their mixture is passed through.
Biases are leaves too. A backward pass from anything then gives what it reads of every leaf, and
since all is affine, leaf times gradient adds up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...checkpoint_code.errors import InputError
from ...checkpoint_code.record import ReadableFFN
from ...families.lookup import find_stock_ffn
from ..model_parts import (
    get_attention,
    get_blocks,
    get_final_norm,
    get_layer_number,
    get_output_projection,
    get_qkv_names,
    has_tied_rows,
    list_ffn_paths,
)
from ..norms import MISFIT, NormResponse, measure_norm
from ..tracing import use_eager_attention

WRITERS = ("embedding", "position", "bias", "ffn", "head")
"""What a leaf may be."""


class Leaf(NamedTuple):
    """Something that is written, whatever writes it."""

    kind: str
    """One of :data:`WRITERS`."""
    layer: int
    """The block that writes it; −1 before the first, their number after the last."""
    tensor: Tensor
    """(1, T, size), or (vocabulary,) for the bias of the unembedding."""


class FrozenPass:
    """A pass over T tokens, kept for backward passes through what is linear in it."""

    def __init__(self) -> None:
        self.leaves: list[Leaf] = []
        self.ffn_inputs: dict[str, Tensor] = {}
        """(1, T, hidden_size) by path."""
        self.ffn_outputs: dict[str, Tensor] = {}
        """(1, T, hidden_size) by path."""
        self.heads: dict[int, Tensor] = {}
        """(1, T, heads · head_dim) by layer: what heads write, before the output projection."""
        self.logits = torch.empty(0)
        """(1, T, vocabulary)."""

    def add_leaf(self, kind: str, layer: int, value: Tensor) -> Tensor:
        """Make ``value`` a leaf, and return it."""
        leaf = value.detach().clone().requires_grad_()
        self.leaves.append(Leaf(kind, layer, leaf))
        return leaf

    def add_constant(self, layer: int, value: Tensor) -> Tensor:
        """Zero, through which gradients reach a bias leaf of ``value``."""
        leaf = self.add_leaf("bias", layer, value)
        return leaf - leaf.detach()

    def pull_back(self, outputs: list[Tensor], seeds: list[Tensor]) -> list[Tensor | None]:
        """What each of B directions reads of every leaf, in their order.

        Args:
            outputs: tensors of the pass.
            seeds: of each of them B directions, (B, *shape).

        Returns:
            (B, *shape of the leaf), or None where nothing is read.
        """
        tensors = [leaf.tensor for leaf in self.leaves]
        return list(
            torch.autograd.grad(
                outputs,
                tensors,
                seeds,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        )


def run_frozen(model: PreTrainedModel, ids: Tensor, heads: bool = False) -> FrozenPass:
    """Run ``model`` (a causal language model) over ``ids`` (T,), all but its FFNs linear.

    Args:
        heads: whether heads are leaves too, which cuts what passes through attention.

    Raises:
        InputError: the table's entry does not describe the family's attention and final norm, or a
            norm is neither a LayerNorm nor an RMSNorm.
    """
    passed = FrozenPass()
    model.eval()
    with ExitStack() as stack:
        stack.enter_context(freeze_parameters(model))
        stack.enter_context(use_eager_attention(model))
        stack.enter_context(_attach_hooks(model, passed, heads))
        with torch.enable_grad():
            passed.logits = model(input_ids=ids[None], use_cache=False).logits
    return passed


@contextmanager
def freeze_parameters(model: PreTrainedModel) -> Iterator[None]:
    """Keep gradients off the parameters while the context is open."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _attach_hooks(model: PreTrainedModel, passed: FrozenPass, heads: bool) -> Iterator[None]:
    """Make the model linear between leaves while the context is open."""
    # Before any hook is there: norms are measured by copies of them.
    norms = [(norm, layer, measure_norm(norm, _like(model))) for norm, layer in _list_norms(model)]
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        handles += _hook_embeddings(model, passed)
        for norm, layer, response in norms:
            hook = _make_norm_hook(passed, layer, response)
            handles.append(norm.register_forward_hook(hook))
        for layer in range(len(get_blocks(model))):
            handles += _hook_attention(model, passed, layer, heads=heads)
        for path in list_ffn_paths(model):
            handles += _hook_ffn(model, passed, path)
        head = cast(nn.Module, model.get_output_embeddings())
        if getattr(head, "bias", None) is not None:
            hook = _make_bias_hook(passed, len(get_blocks(model)), head, is_unembedding=True)
            handles.append(head.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _like(model: PreTrainedModel) -> Tensor:
    """A vector of the residual stream's width and device."""
    weight = cast(Tensor, model.get_input_embeddings().weight)
    return weight.new_zeros(1, model.config.hidden_size)


def _list_norms(model: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """Every norm on the residual stream and on what is written into it, with its block.

    In a block that is every child but attention, FFN and what does nothing in eval mode.
    """
    ffns = [model.base_model.get_submodule(path) for path in list_ffn_paths(model)]
    norms: list[tuple[nn.Module, int]] = []
    blocks = get_blocks(model)
    for layer, block in enumerate(blocks):
        attention = get_attention(model, layer)
        for child in block.children():
            holds_another = any(part is attention or part in ffns for part in child.modules())
            if not holds_another and not isinstance(child, (nn.Dropout, nn.Identity)):
                norms.append((child, layer))
    norms.append((get_final_norm(model), len(blocks)))
    return norms


def _hook_embeddings(
    model: PreTrainedModel, passed: FrozenPass
) -> list[torch.utils.hooks.RemovableHandle]:
    """Make the embeddings of tokens, and of positions where a table has them, leaves."""
    tokens = model.get_input_embeddings()
    handles = []
    for module in model.base_model.children():
        if isinstance(module, nn.Embedding):
            kind = "embedding" if module is tokens else "position"

            def make_leaf(
                module: nn.Module, args: tuple, output: Tensor, kind: str = kind
            ) -> Tensor:
                rows = output if output.ndim == 3 else output[None]
                return passed.add_leaf(kind, -1, rows).clone()

            handles.append(module.register_forward_hook(make_leaf))
    return handles


def _make_norm_hook(
    passed: FrozenPass, layer: int, response: NormResponse
) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    """Hold the scale of a norm in block ``layer``: it writes the same, and is affine."""

    def linearise(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        numerator = response.numerator(args[0])
        shift = response.shift.to(output)
        with torch.no_grad():
            normalised = output - shift
            square = numerator.square().sum(-1, keepdim=True)
            tiny = torch.finfo(square.dtype).tiny
            inverse_scale = (normalised * numerator).sum(-1, keepdim=True) / square.clamp_min(tiny)
            misfit = (normalised - inverse_scale * numerator).norm()
            if not misfit <= MISFIT * normalised.norm():
                raise InputError(
                    f"found a {type(module).__name__} in block {layer}, expected a LayerNorm or "
                    "an RMSNorm: it is not linear once its scale is held"
                )
        linear = inverse_scale * numerator
        held = output.detach() + (linear - linear.detach())
        if not shift.any():
            return held
        return held + passed.add_constant(layer, shift.expand_as(output))

    return linearise


def _make_bias_hook(
    passed: FrozenPass, layer: int, linear: nn.Module, *, is_unembedding: bool = False
) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    """Make the bias of ``linear`` a leaf: at every token, or once for the unembedding."""
    bias = cast(Tensor, linear.bias)

    def add_bias(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        value = bias if is_unembedding else bias.expand_as(output)
        return output + passed.add_constant(layer, value)

    return add_bias


def _hook_attention(
    model: PreTrainedModel, passed: FrozenPass, layer: int, *, heads: bool
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hold queries and keys of block ``layer``; make biases, and heads if asked for, leaves."""
    attention = get_attention(model, layer)
    names = get_qkv_names(model)
    handles = []

    def hold(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.detach()

    def hold_first_thirds(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        query, key, value = output.chunk(3, -1)
        value = value + _value_constant(passed, layer, module, value)
        return torch.cat([query.detach(), key.detach(), value], -1)

    def keep_value(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + _value_constant(passed, layer, module, output)

    projections = [attention.get_submodule(name) for name in names]
    if len(projections) == 1:
        handles.append(projections[0].register_forward_hook(hold_first_thirds))
    else:
        handles += [projection.register_forward_hook(hold) for projection in projections[:-1]]
        handles.append(projections[-1].register_forward_hook(keep_value))

    def cut_heads(module: nn.Module, args: tuple) -> tuple:
        passed.heads[layer] = args[0]
        return (passed.add_leaf("head", layer, args[0]).clone(), *args[1:])

    output_projection = get_output_projection(model, layer)
    if heads:
        handles.append(output_projection.register_forward_pre_hook(cut_heads))
    if getattr(output_projection, "bias", None) is not None:
        hook = _make_bias_hook(passed, layer, output_projection)
        handles.append(output_projection.register_forward_hook(hook))
    return handles


def _value_constant(
    passed: FrozenPass, layer: int, projection: nn.Module, value: Tensor
) -> Tensor | float:
    """The bias of values as a leaf: zero, through which gradients reach it."""
    bias = cast(Tensor | None, projection.bias)
    if bias is None:
        return 0.0
    return passed.add_constant(layer, bias[-value.shape[-1] :].expand_as(value))


def _hook_ffn(
    model: PreTrainedModel, passed: FrozenPass, path: str
) -> list[torch.utils.hooks.RemovableHandle]:
    """Keep what the FFN at ``path`` reads, and make what it writes a leaf."""
    ffn = model.base_model.get_submodule(path)
    last = ffn
    if not isinstance(ffn, ReadableFFN):
        output_path = find_stock_ffn(model, path).output_path
        last = model.base_model.get_submodule(output_path)

    def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            passed.ffn_inputs[path] = args[0]
            return (args[0].detach(), *args[1:]), kwargs
        passed.ffn_inputs[path] = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}

    def cut_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if not (has_tied_rows(ffn) and ffn.config.settings.skip):
            passed.ffn_outputs[path] = output.detach()
            return passed.add_leaf("ffn", get_layer_number(path), output).clone()
        linear = ffn.skip(passed.ffn_inputs[path])  # passes on what was written before
        mixture = output - linear.detach()
        passed.ffn_outputs[path] = mixture.detach()
        return passed.add_leaf("ffn", get_layer_number(path), mixture) + linear

    return [
        ffn.register_forward_pre_hook(keep_input, with_kwargs=True),
        last.register_forward_hook(cut_output),
    ]
