"""Attention has a Hilbert space only when it is symmetrised: the nearest such kernel of one head, and what is lost by it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from .model_parts import get_attention, get_projection_weight, get_qkv_names
from .tracing import Trace


class SymmetrisedAttention(NamedTuple):
    """The symmetric positive semi-definite part of one head's score, and what is lost by it; T tokens."""

    form: Tensor
    """M, (d, d), or (d + 1, d + 1) on (x, 1) where the projections have biases: exp(x·Mx') is a positive definite kernel."""
    kept: float
    """‖M‖² / ‖A‖² (Frobenius)."""
    antisymmetric: float
    """Share of ‖A‖² in (A − Aᵀ)/2; the rest of what is not kept has negative eigenvalues."""
    least_plain: float
    """Smallest over largest eigenvalue of the prompt's Gram matrix of exp(x·Ax'), averaged with its transpose (which leaves the
    quadratic form as it is) and scaled to a unit diagonal (which leaves the eigenvalues' signs): below zero, there is no RKHS."""
    least_symmetrised: float
    """The same of exp(x·Mx'): nonnegative up to rounding."""
    variation: float
    """Mean total variation between the weights by A and those by M, over tokens, each attending to itself and those before."""
    positional: float
    """Mean total variation between the weights by A and the head's own, over the positions kept: what rotary embeddings and windows,
    which A leaves out, account for."""
    plain: Tensor
    """(T, T) weights by A."""
    symmetrised: Tensor
    """(T, T) weights by M."""


@torch.no_grad()
def symmetrised_attention(model: Any, trace: Trace, layer: int, head: int) -> SymmetrisedAttention:
    """One head's score as a bilinear form A = W_QᵀW_K/√head_dim on the attention module's inputs, and the nearest M (Frobenius) with
    which exp(x·Mx') has an RKHS: the symmetric part of A without its negative eigenvalues (Higham 1988).

    Content only: rotary embeddings turn A with the distance between tokens and are left out; learned position embeddings are part of
    the inputs. The model runs once more over ``trace.ids`` for these. Memory grows with T².

    Raises:
        InputError: the model normalises queries and keys, so that the score is no bilinear form; or there is no such head.
    """
    attention, names = get_attention(model, layer), get_qkv_names(model)
    if hasattr(attention, "q_norm"):
        raise InputError(
            f"found normalised queries in layer {layer}, expected plain projections: the score is no bilinear form"
        )
    heads = model.config.num_attention_heads
    if not 0 <= head < heads:
        raise InputError(f"found head {head}, expected a number from 0 to {heads - 1}")
    linears = [getattr(attention, name) for name in names]
    weights: list[Tensor] = [_affine(linear) for linear in linears]
    query, key = weights[0].chunk(3)[:2] if len(names) == 1 else weights[:2]
    groups, size = len(query) // len(key), len(query) // heads
    query, key = query[head * size :][:size], key[head // groups * size :][:size]
    form = query.T @ key * getattr(attention, "scaling", size**-0.5)
    values, vectors = torch.linalg.eigh((form + form.T) / 2)
    part = (vectors * values.clamp_min(0)) @ vectors.T

    x = _attention_inputs(model, attention, trace.ids).double()
    if form.shape[0] > x.shape[1]:
        x = nn.functional.pad(x, (0, 1), value=1.0)
    logits = [x @ matrix @ x.T for matrix in (form, part)]
    future = torch.ones_like(logits[0], dtype=torch.bool).triu(1)
    plain, symmetrised = (s.masked_fill(future, -torch.inf).softmax(-1) for s in logits)
    own = trace.attention[layer][head].double()
    square = form.square().sum().clamp_min(1e-300)
    return SymmetrisedAttention(
        form=part,
        kept=(part.square().sum() / square).item(),
        antisymmetric=((form - form.T).square().sum() / 4 / square).item(),
        least_plain=_least(logits[0]),
        least_symmetrised=_least(logits[1]),
        variation=_variation(plain, symmetrised),
        positional=_variation(plain[trace.positions], own),
        plain=plain,
        symmetrised=symmetrised,
    )


def _affine(linear: nn.Module) -> Tensor:
    """(out, in), or (out, in + 1) with the bias as its last column: what acts on (x, 1)."""
    bias: Any = linear.bias
    weight = get_projection_weight(linear)
    return (weight if bias is None else torch.cat([weight, bias.detach()[:, None]], 1)).double()


def _attention_inputs(model: Any, attention: nn.Module, ids: Tensor) -> Tensor:
    """(T, d): what the attention module reads."""
    kept = []
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append((args[0] if args else kwargs["hidden_states"])[0]),
        with_kwargs=True,
    )
    try:
        model.eval().base_model(input_ids=ids[None], use_cache=False)
    finally:
        hook.remove()
    return kept[0]


def _least(logits: Tensor) -> float:
    diagonal = logits.diagonal()
    logits = logits - (diagonal[:, None] + diagonal) / 2
    gram = (logits - logits.max()).exp()
    values = torch.linalg.eigvalsh((gram + gram.T) / 2)
    return (values[0] / values[-1]).item()


def _variation(p: Tensor, q: Tensor) -> float:
    return (p - q).abs().sum(-1).mean().item() / 2
