"""Attention has a Hilbert space only when it is symmetrised: the nearest such kernel of one head.

And what is lost by it.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from .model_parts import get_attention, get_projection_weight, get_qkv_names
from .tracing import Trace

TINY = 1e-300
"""Keeps a division by the norm of a form that is zero defined."""


class SymmetrisedAttention(NamedTuple):
    """The symmetric positive semi-definite part of one head's score, and what is lost by it.

    T is the number of tokens, A the head's own form, M the symmetrised one.
    """

    form: Tensor
    """M, (d, d), or (d + 1, d + 1) on (x, 1) where the projections have biases: exp(x·Mx') is a
    positive definite kernel."""
    kept: float
    """‖M‖² / ‖A‖² (Frobenius)."""
    antisymmetric: float
    """Share of ‖A‖² in (A − Aᵀ)/2; the rest of what is not kept has negative eigenvalues."""
    least_plain: float
    """Smallest over largest eigenvalue of the prompt's Gram matrix of exp(x·Ax'). The matrix is
    averaged with its transpose (which leaves the quadratic form as it is) and scaled to a unit
    diagonal (which leaves the eigenvalues' signs). Below zero, there is no RKHS."""
    least_symmetrised: float
    """The same of exp(x·Mx'): nonnegative up to rounding."""
    variation: float
    """Mean total variation between the weights by A and those by M, over tokens, each attending to
    itself and those before."""
    positional: float
    """Mean total variation between the weights by A and the head's own, over the positions kept:
    what rotary embeddings and windows, which A leaves out, account for."""
    plain: Tensor
    """(T, T) weights by A."""
    symmetrised: Tensor
    """(T, T) weights by M."""


@torch.no_grad()
def symmetrised_attention(
    model: PreTrainedModel, trace: Trace, layer: int, head: int
) -> SymmetrisedAttention:
    """Symmetrise one head's score, a bilinear form on the attention module's inputs.

    The form is A = W_QᵀW_K/√head_dim. The nearest M (Frobenius) with which exp(x·Mx') has an
    RKHS is the symmetric part of A without its negative eigenvalues (Higham 1988).

    Content only: rotary embeddings turn A with the distance between tokens and are left out;
    learned position embeddings are part of the inputs. The model runs once more over ``trace.ids``
    for these. Memory grows with T².

    Raises:
        InputError: the model normalises queries and keys, so that the score is no bilinear form; or
            there is no such head.
    """
    attention = get_attention(model, layer)
    if hasattr(attention, "q_norm"):
        raise InputError(
            f"found normalised queries in layer {layer}, expected plain projections: the score is "
            "no bilinear form"
        )
    heads = model.config.num_attention_heads
    if not 0 <= head < heads:
        raise InputError(f"found head {head}, expected a number from 0 to {heads - 1}")

    form = _read_form(model, attention, head)
    nearest = _find_nearest_semidefinite(form)
    states = _read_attention_inputs(model, attention, trace.ids).double()
    if form.shape[0] > states.shape[1]:
        states = nn.functional.pad(states, (0, 1), value=1.0)
    logits = states @ form @ states.T
    logits_symmetrised = states @ nearest @ states.T
    plain = _attend_to_past(logits)
    symmetrised = _attend_to_past(logits_symmetrised)

    square = form.square().sum().clamp_min(TINY)
    own_weights = trace.attention[layer][head].double()
    return SymmetrisedAttention(
        form=nearest,
        kept=(nearest.square().sum() / square).item(),
        antisymmetric=((form - form.T).square().sum() / 4 / square).item(),
        least_plain=_measure_least_eigenvalue(logits),
        least_symmetrised=_measure_least_eigenvalue(logits_symmetrised),
        variation=_measure_variation(plain, symmetrised),
        positional=_measure_variation(plain[trace.positions], own_weights),
        plain=plain,
        symmetrised=symmetrised,
    )


def _read_form(model: PreTrainedModel, attention: nn.Module, head: int) -> Tensor:
    """A of one head, float64."""
    names = get_qkv_names(model)
    maps = [_read_affine_map(attention.get_submodule(name)) for name in names]
    query, key = maps[0].chunk(3)[:2] if len(maps) == 1 else maps[:2]

    groups = len(query) // len(key)
    head_dim = len(query) // model.config.num_attention_heads
    query_of_head = query[head * head_dim :][:head_dim]
    key_of_head = key[head // groups * head_dim :][:head_dim]
    return query_of_head.T @ key_of_head * getattr(attention, "scaling", head_dim**-0.5)


def _read_affine_map(linear: nn.Module) -> Tensor:
    """(out, in), or (out, in + 1) with the bias as its last column: what acts on (x, 1)."""
    weight = get_projection_weight(linear)
    bias = cast(Tensor | None, linear.bias)
    if bias is not None:
        weight = torch.cat([weight, bias.detach()[:, None]], 1)
    return weight.double()


def _find_nearest_semidefinite(form: Tensor) -> Tensor:
    """The symmetric part of ``form`` (d, d) without its negative eigenvalues."""
    values, vectors = torch.linalg.eigh((form + form.T) / 2)
    return (vectors * values.clamp_min(0)) @ vectors.T


def _attend_to_past(logits: Tensor) -> Tensor:
    """(T, T) weights of ``logits``, each token attending to itself and those before."""
    future = torch.ones_like(logits, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def _read_attention_inputs(model: PreTrainedModel, attention: nn.Module, ids: Tensor) -> Tensor:
    """(T, d): what the attention module reads."""
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        inputs.append(states[0])

    hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model.eval().base_model(input_ids=ids[None], use_cache=False)
    finally:
        hook.remove()
    return inputs[0]


def _measure_least_eigenvalue(logits: Tensor) -> float:
    """Smallest over largest eigenvalue of exp(``logits``) (T, T), symmetrised, at unit diagonal."""
    diagonal = logits.diagonal()
    logits = logits - (diagonal[:, None] + diagonal) / 2
    gram = (logits - logits.max()).exp()
    values = torch.linalg.eigvalsh((gram + gram.T) / 2)
    return (values[0] / values[-1]).item()


def _measure_variation(weights: Tensor, others: Tensor) -> float:
    """Mean total variation between the rows of two (rows, T) tables of weights."""
    return (weights - others).abs().sum(-1).mean().item() / 2
