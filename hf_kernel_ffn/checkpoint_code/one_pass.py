"""The dense Yat readouts in one pass over chunks of tokens: Σ κ_i u_i v_i, or that over Σ κ_i.

The kernel values of all tokens are never held at once. It is the same function as the plain form
in operators.py, and as that in ffn.py, which stays the reference.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, library

from .kernels import HalfYat
from .operators import (
    ARGUMENTS,
    TENSORS,
    MixtureArguments,
    chunks,
    differentiate,
    empty_gradients,
    namespace,
    score_dtype,
)
from .product_gradients import ProductGradients
from .yat_terms import BackwardSums, make_terms

if TYPE_CHECKING:
    from .ffn import KernelFFN

NAMESPACE = namespace(__name__)
FORWARD_MATRICES = 2
"""Matrices of the size of x·w that are held at once in the forward pass, for each that is made."""
BACKWARD_MATRICES = 4
"""The same in the backward pass."""


def mix_dense_yat(
    ffn: KernelFFN, hidden_states: Tensor, mixture: Callable[..., Tensor] | None = None
) -> Tensor:
    """The output (..., hidden_size) of a dense Yat readout, before dropout.

    plan.py says whether ``ffn`` is one at these ``hidden_states`` (..., hidden_size).

    Args:
        mixture: takes the fields of MixtureArguments in order; None for :func:`yat_mixture`.
    """
    mixture = mixture or yat_mixture
    settings = ffn.config.settings
    device = hidden_states.device.type
    mix = hidden_states.dtype
    if torch.is_autocast_enabled(device):
        mix = torch.get_autocast_dtype(device)
    up = ffn.value_proj if settings.values == "gated" else None
    convex = not settings.coefficients_are_kernel

    arguments = MixtureArguments(
        x=hidden_states.reshape(-1, hidden_states.shape[-1]),
        rows=ffn.input_prototypes.weight,
        bias=ffn.input_prototypes.bias,
        dictionary=ffn.output_prototypes.weight,
        epsilon=ffn.positive("epsilon"),
        factor=ffn.positive("temperature" if convex else "scale"),
        up=None if up is None else up.weight,
        up_bias=None if up is None else up.bias,
        one_sided=type(ffn.kernel) is HalfYat,
        mix=mix,
        limit=ffn.activation_bytes,
        convex=convex,
    )
    written = mixture(*arguments).view(hidden_states.shape)
    if settings.intensity == "gate":
        written = (written * ffn.gate_intensity(hidden_states)).to(mix)
    return written + ffn.output_prototypes.bias.to(mix)


def yat_mixture(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    dictionary: Tensor,
    epsilon: Tensor,
    factor: Tensor,
    up: Tensor | None,
    up_bias: Tensor | None,
    one_sided: bool,
    mix: torch.dtype,
    limit: int,
    convex: bool,
) -> Tensor:
    """The function :func:`operators.plain` in chunks of tokens; differentiable.

    x·w and u·x are kept for the backward pass if they take at most ``limit`` bytes, and computed
    again there otherwise.
    """
    tensors = (x, rows, bias, dictionary, epsilon, factor, up, up_bias)
    keep = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    return _mixture(*tensors, one_sided, mix, limit, convex, keep)[0]


@library.custom_op(
    f"{NAMESPACE}::mixture",
    mutates_args=(),
    schema=f"({ARGUMENTS}, bool keep) "
    "-> (Tensor written, Tensor log_mass, Tensor dots, Tensor ups)",
)
def _mixture(*arguments: Any) -> tuple[Tensor, ...]:
    """The mixture; log Σ κ^(1/τ) (N, 1) if convex; and x·w and u·x (N, P), if they are kept.

    Outputs that there is no use for are empty.
    """
    *fields, keep = arguments
    given = MixtureArguments(*fields)
    x = given.x
    terms = make_terms(given)
    keep = keep and _may_be_kept(given)
    written = x.new_empty(len(x), given.dictionary.shape[0], dtype=given.mix)
    dictionary = given.dictionary.to(given.mix)

    dots = None
    ups = None
    all_at_once = [slice(0, len(x))]
    in_chunks = chunks(len(x), given.limit, FORWARD_MATRICES * terms.bytes_per_token)
    with torch.autocast(x.device.type, enabled=False):
        for part in all_at_once if keep else in_chunks:
            dots, ups = terms.compute_products(x[part])
            out = torch.empty_like(dots) if keep else dots
            coefficients = terms.compute_coefficients(part, dots, ups, out)
            torch.mm(coefficients.to(given.mix), dictionary.T, out=written[part])
        terms.finish(written)

    kept = (terms.log_mass, dots if keep else None, ups if keep else None)
    nothing = [x.new_empty(0, dtype=terms.dtype) for _ in kept]  # outputs may not be one tensor
    outputs = [
        empty if tensor is None else tensor for tensor, empty in zip(kept, nothing, strict=True)
    ]
    return written, *outputs


@_mixture.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, keep = arguments
    given = MixtureArguments(*fields)
    x = given.x
    dtype = score_dtype(x, given.rows)
    keep = keep and _may_be_kept(given)
    kept = (x.shape[0], given.rows.shape[0])
    return (
        x.new_empty(x.shape[0], given.dictionary.shape[0], dtype=given.mix),
        x.new_empty((x.shape[0], 1) if given.convex else 0, dtype=dtype),
        x.new_empty(kept if keep else 0, dtype=dtype),
        x.new_empty(kept if keep and given.up is not None else 0, dtype=dtype),
    )


def _may_be_kept(given: MixtureArguments) -> bool:
    """Whether x·w and u·x of all tokens fit the limit."""
    size = given.x.shape[0] * given.rows.shape[0] * score_dtype(given.x, given.rows).itemsize
    return size * (1 if given.up is None else 2) <= given.limit


@library.custom_op(
    f"{NAMESPACE}::mixture_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor written, Tensor log_mass, Tensor kept_dots, Tensor kept_ups, "
    f"bool[] wanted, {ARGUMENTS}, bool keep) -> ({', '.join(['Tensor'] * TENSORS)})",
)
def _mixture_backward(
    gradient: Tensor,
    written: Tensor,
    log_mass: Tensor,
    kept_dots: Tensor,
    kept_ups: Tensor,
    wanted: list[bool],
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """Gradients of the eight tensors among the arguments, empty where not wanted."""
    *fields, keep = arguments
    given = MixtureArguments(*fields)
    x = given.x
    terms = make_terms(given)
    keep = keep and _may_be_kept(given)

    with torch.autocast(x.device.type, enabled=False):
        gradient = gradient.to(given.mix)
        dictionary = given.dictionary.to(given.mix)
        mean = (gradient.to(terms.dtype) * written.to(terms.dtype)).sum(-1, keepdim=True)
        sums = BackwardSums(terms, mean, log_mass)
        products = ProductGradients(given, terms.dtype, wanted)

        for part in chunks(len(x), given.limit, BACKWARD_MATRICES * terms.bytes_per_token):
            if keep:
                dots = kept_dots[part]
                ups = None if given.up is None else kept_ups[part]
            else:
                dots, ups = terms.compute_products(x[part])
            d_coefficients = (gradient[part] @ dictionary).to(terms.dtype)
            coefficients = torch.empty_like(d_coefficients)
            d_ups = None if given.up is None else torch.empty_like(d_coefficients)
            terms.backward(
                part,
                dots=dots,
                ups=ups,
                d_coefficients=d_coefficients,
                coefficients=coefficients,
                d_ups=d_ups,
                sums=sums,
            )
            products.add(
                part,
                gradient=gradient[part],
                coefficients=coefficients,
                half_d_dots=d_coefficients,  # overwritten by backward()
                d_ups=d_ups,
            )

        per_token = sums.per_token / terms.inside
        per_row = sums.per_row / terms.inside
        products.add_distances(per_token, per_row)
        d_epsilon = -(per_row.sum() + sums.touching / terms.inside)

    all_gradients = (
        products.d_x,
        products.d_rows,
        2 * sums.scores,
        products.d_dictionary,
        d_epsilon.reshape(1),
        terms.d_factor(sums).reshape(1),
        products.d_up,
        sums.ups,
    )
    gradients = [
        gradient_of if is_wanted else None
        for gradient_of, is_wanted in zip(all_gradients, wanted, strict=True)
    ]
    return tuple(
        x.new_empty(0) if tensor is None or gradient_of is None else gradient_of.to(tensor.dtype)
        for gradient_of, tensor in zip(gradients, given.tensors(), strict=True)
    )


@_mixture_backward.register_fake
def _(
    gradient: Tensor,
    written: Tensor,
    log_mass: Tensor,
    kept_dots: Tensor,
    kept_ups: Tensor,
    wanted: list[bool],
    *arguments: Any,
) -> tuple[Tensor, ...]:
    return empty_gradients(arguments[0], arguments[:TENSORS], wanted)


differentiate(_mixture, _mixture_backward)
