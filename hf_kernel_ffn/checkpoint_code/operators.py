"""Mixtures of output prototypes as operators of torch: opaque to a compiler, differentiable, and twice so by way of their plain form.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

import re

import torch

from .kernels import get_kernel
from .simplex import compute_shares

ARGUMENTS = (
    "Tensor x, Tensor rows, Tensor bias, Tensor dictionary, Tensor epsilon, Tensor factor, Tensor? up, Tensor? up_bias, "
    "bool one_sided, ScalarType mix, int limit, bool convex"
)
"""Of every mixture, as :func:`plain` takes them."""
TENSORS = 8
"""How many of them come first and are tensors."""


def plain(x, rows, bias, dictionary, epsilon, factor, up, up_bias, one_sided, mix, limit, convex):
    """``Σ_i factor · κ_i(x) · u_i(x) · v_i``; or, if ``convex``, ``Σ_i π_i u_i(x) v_i`` with π = softmax(log κ / factor), zero where
    nothing fires. κ = s² / (‖x − w‖² + ε), or relu(s)² in place of s² if ``one_sided``, with s = x·w + b.

    Arguments: x (N, d); rows (P, d) and bias (P,); dictionary (d, P), columns v_i; epsilon and factor (1,), at least float32; up (P, d)
    and up_bias (P,), or None where u_i = 1 or has no bias; mix: the dtype of the coefficients and of their product; limit: bytes that
    temporaries may take, which other forms than this one keep to.
    Returns (N, d) in ``mix``.
    """
    dtype = score_dtype(x, rows)
    x, rows, epsilon, factor = x.to(dtype), rows.to(dtype), epsilon.to(dtype), factor.to(dtype)
    dot = torch.nn.functional.linear(x, rows)
    distance = (x.square().sum(-1, keepdim=True) + rows.square().sum(-1) - 2 * dot).clamp_min(0)
    kernel, score = get_kernel("half-yat" if one_sided else "yat"), dot + bias.to(dtype)
    if convex:
        choice = compute_shares("softmax", kernel.log(score, distance, epsilon=epsilon), factor)
    else:
        choice = kernel.scaled(score, distance, factor.log(), epsilon=epsilon)
    if up is not None:
        choice = choice * torch.nn.functional.linear(
            x, up.to(dtype), None if up_bias is None else up_bias.to(dtype)
        )
    return choice.to(mix) @ dictionary.to(mix).T


def score_dtype(x, rows):
    """What scores are computed in: float32 at least."""
    return torch.promote_types(torch.promote_types(x.dtype, rows.dtype), torch.float32)


def namespace(module):
    """Of a module's operators: one per copy of a file, since a process may hold the package's and those of several checkpoints."""
    return re.sub(r"\W", "_", module)


def differentiate(mixture, backward):
    """Make ``backward`` the derivative of the operator ``mixture``, whose arguments are ARGUMENTS and perhaps more, and whose first
    output is the mixture. ``backward(gradient, *outputs, wanted, *arguments)``: gradients of the eight tensors, empty where not wanted."""

    def setup(ctx, inputs, output):
        ctx.settings = inputs[TENSORS:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], *output)

    def derive(ctx, gradient, *_):
        saved = ctx.saved_tensors  # under gradient checkpointing to be asked for once
        tensors, outputs = saved[:TENSORS], saved[TENSORS:]
        wanted, settings = list(ctx.needs_input_grad[:TENSORS]), ctx.settings
        nothing = (None,) * len(settings)
        if gradient is None:
            return (None,) * TENSORS + nothing
        if torch.is_grad_enabled():  # a graph of the gradient itself is asked for
            with torch.autocast(gradient.device.type, enabled=False):
                given = [t for t, asked in zip(tensors, wanted) if asked]
                found = iter(
                    torch.autograd.grad(
                        plain(*tensors, *settings[:4]), given, gradient, create_graph=True
                    )
                )
            return tuple(next(found) if asked else None for asked in wanted) + nothing
        found = backward(gradient, *outputs, wanted, *tensors, *settings)
        return tuple(g if asked else None for g, asked in zip(found, wanted)) + nothing

    mixture.register_autograd(derive, setup_context=setup)


def empty_gradients(x, like, wanted):
    """What a derivative's outputs look like: those of ``like`` (eight tensors or None), empty where not wanted."""
    return tuple(
        x.new_empty(0) if t is None or not asked else torch.empty_like(t)
        for t, asked in zip(like, wanted)
    )


def chunks(count, limit, bytes_per_token):
    """Slices of ``count`` tokens whose temporaries take at most ``limit`` bytes together; equal ones."""
    number = -(-count * bytes_per_token // limit)
    size = max(1, -(-count // max(1, number)))
    for low in range(0, count, size):
        yield slice(low, min(low + size, count))
