"""Mixtures of output prototypes as operators of torch.

An operator is opaque to a compiler and differentiable; its second derivative goes by way of its
plain form, which is the reference for every other form.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kernels import get_kernel
from .simplex import compute_shares

ARGUMENTS = (
    "Tensor x, Tensor rows, Tensor bias, Tensor dictionary, Tensor epsilon, Tensor factor, "
    "Tensor? up, Tensor? up_bias, bool one_sided, ScalarType mix, int limit, bool convex"
)
"""The schema of what every mixture takes first: the fields of :class:`MixtureArguments`."""
TENSORS = 8
"""How many of them come first and are tensors."""


class MixtureArguments(NamedTuple):
    """What every mixture takes, in this order: N tokens, P prototypes, hidden_size d."""

    x: Tensor
    """(N, d) inputs."""
    rows: Tensor
    """(P, d) input prototypes w_i."""
    bias: Tensor
    """(P,) b_i of the score x·w_i + b_i."""
    dictionary: Tensor
    """(d, P): output prototypes v_i as columns."""
    epsilon: Tensor
    """(1,) ε of the kernel, at least float32."""
    factor: Tensor
    """(1,) at least float32: the scale, or the temperature if ``convex``."""
    up: Tensor | None
    """(P, d) rows u_i of gated values; None where u_i·x = 1."""
    up_bias: Tensor | None
    """(P,) bias of u_i·x, or None."""
    one_sided: bool
    """Whether the kernel is half-yat rather than yat: relu(s)² in place of s²."""
    mix: torch.dtype
    """dtype of the coefficients and of their product with the dictionary."""
    limit: int
    """Bytes that temporaries may take; the plain form alone does not keep to it."""
    convex: bool
    """Whether the coefficients are shares π rather than scale · κ."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The first eight."""
        inputs = (self.x, self.rows, self.bias, self.dictionary)
        return (*inputs, self.epsilon, self.factor, self.up, self.up_bias)


def plain(
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
    """The mixture, (N, d) in ``mix``, by its formula; arguments as in :class:`MixtureArguments`.

    ``Σ_i factor · κ_i(x) · u_i(x) · v_i``; or, if ``convex``, ``Σ_i π_i u_i(x) v_i`` with
    π = softmax(log κ / factor), zero where nothing fires. With s = x·w + b,
    κ = s² / (‖x − w‖² + ε), or relu(s)² in place of s² if ``one_sided``.
    """
    dtype = score_dtype(x, rows)
    x = x.to(dtype)
    rows = rows.to(dtype)
    epsilon = epsilon.to(dtype)
    factor = factor.to(dtype)

    dot = nn.functional.linear(x, rows)
    squared_norms = x.square().sum(-1, keepdim=True) + rows.square().sum(-1)
    distance2 = (squared_norms - 2 * dot).clamp_min(0)
    score = dot + bias.to(dtype)

    kernel = get_kernel("half-yat" if one_sided else "yat")
    if convex:
        log_kernel = kernel.log(score, distance2, epsilon=epsilon)
        coefficients = compute_shares("softmax", log_kernel, factor)
    else:
        coefficients = kernel.scaled(score, distance2, factor.log(), epsilon=epsilon)
    if up is not None:
        up_bias = None if up_bias is None else up_bias.to(dtype)
        coefficients = coefficients * nn.functional.linear(x, up.to(dtype), up_bias)
    return coefficients.to(mix) @ dictionary.to(mix).T


def score_dtype(x: Tensor, rows: Tensor) -> torch.dtype:
    """The dtype in which scores are computed: at least float32."""
    return torch.promote_types(torch.promote_types(x.dtype, rows.dtype), torch.float32)


def namespace(module: str) -> str:
    """The namespace of the operators of ``module``.

    Every copy of a file has its own: a process may hold the package's operators and those of
    several checkpoints. A folder may be called anything, and torch takes ASCII letters alone: the
    others are written by their numbers.
    """
    ascii_letters = re.sub(r"[^\x00-\x7f]", lambda found: f"__{ord(found[0]):x}__", module)
    return re.sub(r"\W", "_", ascii_letters)


def differentiate(mixture: Any, backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """Make ``backward`` the derivative of ``mixture``.

    Args:
        mixture: an operator that takes ARGUMENTS and perhaps more; its first output is the mixture.
        backward: takes (gradient, *outputs, wanted, *arguments) and returns the gradients of the
            eight tensors, empty where ``wanted`` is False.
    """

    def save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.settings = inputs[TENSORS:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], *output)

    def derive(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # under gradient checkpointing, this may be read only once
        tensors = saved[:TENSORS]
        outputs = saved[TENSORS:]
        settings = ctx.settings
        wanted = list(ctx.needs_input_grad[:TENSORS])

        gradients: list[Tensor | None] = [None] * TENSORS
        if gradient is not None and torch.is_grad_enabled():
            gradients = _differentiate_plain_form(gradient, wanted, tensors, settings)
        elif gradient is not None:
            gradients = list(backward(gradient, *outputs, wanted, *tensors, *settings))
        of_tensors = [
            gradient if is_wanted else None
            for gradient, is_wanted in zip(gradients, wanted, strict=True)
        ]
        return (*of_tensors, *[None] * len(settings))

    mixture.register_autograd(derive, setup_context=save_for_backward)


def _differentiate_plain_form(
    gradient: Tensor, wanted: list[bool], tensors: tuple, settings: tuple
) -> list[Tensor | None]:
    """Gradients that have a graph themselves, of the eight tensors; None where not wanted."""
    inputs = [tensor for tensor, is_wanted in zip(tensors, wanted, strict=True) if is_wanted]
    with torch.autocast(gradient.device.type, enabled=False):
        written = plain(*tensors, *settings[: len(MixtureArguments._fields) - TENSORS])
        of_inputs = iter(torch.autograd.grad(written, inputs, gradient, create_graph=True))
    return [next(of_inputs) if is_wanted else None for is_wanted in wanted]


def empty_gradients(
    x: Tensor, like: tuple[Tensor | None, ...], wanted: list[bool]
) -> tuple[Tensor, ...]:
    """What a derivative's outputs look like, for a compiler.

    Like the eight tensors (or None) in ``like``, and of no size where not ``wanted``.
    """
    return tuple(
        x.new_empty(0) if tensor is None or not is_wanted else torch.empty_like(tensor)
        for tensor, is_wanted in zip(like, wanted, strict=True)
    )


def chunks(count: int, limit: int, bytes_per_token: int) -> Iterator[slice]:
    """Slices of ``count`` tokens, about equal, whose temporaries take at most ``limit`` bytes."""
    number = -(-count * bytes_per_token // limit)
    size = max(1, -(-count // max(1, number)))
    for low in range(0, count, size):
        yield slice(low, min(low + size, count))
