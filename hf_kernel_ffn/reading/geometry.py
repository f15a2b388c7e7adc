"""The geometry that a kernel brings: Gram matrices, norms and distances, each where it is defined, and refused by name where not.

Positive definiteness makes a reproducing kernel Hilbert space, and nonnegativity makes a mixture; they are independent. A layer is a
function in that space only if nothing stands between kernel and output (no normalisation, no truncation, no gate). What a normalised
readout has there is one token's kernel mean embedding Σ π_i κ(·, w_i). All figures are in float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels import Kernel
from ..readout import KernelFFN, Readout, effective
from .rows import Rows
from .tracing import Trace, attention_of, family_of, projection

RANK = 1e-6
"""Singular values of a dictionary below this share of the largest are rounding: a head's float32 rows span head_dim dimensions."""


def prototypes_of(ffn: KernelFFN) -> tuple[Tensor, Tensor]:
    """(P, d) rows w_i and (P,) b_i (zero for a kernel without) in float64, adapters included."""
    weight, bias = effective(ffn.input_prototypes, _like(ffn))
    rows = weight.detach().double()
    return rows, rows.new_zeros(len(rows)) if bias is None else bias.detach().double()


def scores(points: Tensor, heights: Tensor, rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What a kernel sees between augmented points (x, t) and prototypes (w, b): x·w + t·b and ‖x − w‖², (points, prototypes) each.
    An input of the layer stands at height t = 1, a prototype at its own b."""
    dot = points @ rows.T
    distance2 = points.square().sum(-1, keepdim=True) + rows.square().sum(-1) - 2 * dot
    return dot + heights[:, None] * bias, distance2.clamp_min(0)


@torch.no_grad()
def prototype_kernel(ffn: KernelFFN) -> Tensor:
    """(P, P) K_ij = κ((w_i, b_i), (w_j, b_j)) with the layer's parameters: how much alike its prototypes are to the kernel. Positive
    semi-definite if the kernel is positive definite, up to rounding."""
    return _gram(ffn, *prototypes_of(ffn))


@torch.no_grad()
def function_norm(ffn: KernelFFN) -> float:
    """The squared norm ‖f‖² = tr(VᵀKV) of the layer as a function f = Σ κ(·, w_i) v_i, its scale inside v and b_out left out.

    f is taken on augmented points, the layer's inputs being those at height one: over these alone the least norm can only be smaller
    (Aronszajn 1950, restriction of a kernel).

    Raises:
        InputError: f is not in the kernel's space: the kernel is not positive definite, the readout is normalised, gated, truncated
            or at another temperature than one; the message names which.
    """
    _require_function(ffn)
    rows, bias = prototypes_of(ffn)
    return _square(_gram(ffn, rows, bias), _written(ffn))


@torch.no_grad()
def function_distance(ffn_a: KernelFFN, ffn_b: KernelFFN) -> float:
    """‖f_a − f_b‖ in the one space of two layers. InputError as :func:`function_norm`, or if the spaces differ: other kernels, other
    parameters or another hidden_size."""
    for ffn in (ffn_a, ffn_b):
        _require_function(ffn)
    spaces = [
        (ffn.kernel.name, ffn.config.hidden_size, {n: round(v.item(), 9) for n, v in ffn.kernel_parameters().items()})
        for ffn in (ffn_a, ffn_b)
    ]
    if spaces[0] != spaces[1]:
        raise InputError(
            f"found layers in the spaces of {spaces[0]} and {spaces[1]} (kernel, hidden_size, parameters), expected one space: "
            "norms of two kernels cannot be compared; compare outputs instead"
        )
    # One expansion over both sets of prototypes, the second written with the opposite sign.
    rows, bias = (torch.cat(pair) for pair in zip(prototypes_of(ffn_a), prototypes_of(ffn_b)))
    return math.sqrt(max(0.0, _square(_gram(ffn_a, rows, bias), torch.cat([_written(ffn_a), -_written(ffn_b)]))))


@torch.no_grad()
def embedding_norms(ffn: KernelFFN, readout: Readout) -> Tensor:
    """(tokens,) πᵀKπ: the squared norm of each token's kernel mean embedding Σ π_i κ(·, w_i). Readouts with a truncated map, a gate
    or gated values have one as well: it asks for shares only. InputError unless the kernel is positive definite and there are shares."""
    pi = _embedded(ffn, readout)
    return ((pi @ prototype_kernel(ffn)) * pi).sum(-1)


@torch.no_grad()
def embedding_distances(ffn: KernelFFN, a: Readout, b: Readout) -> Tensor:
    """(tokens of a, tokens of b) ‖Σ π_a κ(·, w) − Σ π_b κ(·, w)‖: the maximum mean discrepancy between the tokens' mixtures of
    prototypes (Gretton et al. 2012, JMLR 13:723, lemma 4), both read at ``ffn``. InputError as :func:`embedding_norms`."""
    pi = [_embedded(ffn, readout) for readout in (a, b)]
    # Coordinates in the span of the prototypes' sections: distances there are exactly zero, symmetric and triangular.
    values, vectors = torch.linalg.eigh(prototype_kernel(ffn))
    root = vectors * values.clamp_min(0).sqrt()
    return torch.cdist(pi[0] @ root, pi[1] @ root, compute_mode="donot_use_mm_for_euclid_dist")


def token_geometry(readout: Readout) -> Tensor:
    """(tokens, tokens) cosines between what tokens use: coefficients c_i weighted by ‖v_i‖. Defined for every record, so that converted
    layers, teachers and heads can be compared; one with a positive definite kernel has :func:`embedding_distances` too."""
    weighted = readout.coefficients.detach().double() * readout.dictionary.detach().double().norm(dim=-1)
    unit = nn.functional.normalize(weighted.flatten(0, -2), dim=-1)
    return unit @ unit.T


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
    attention, names = attention_of(model, layer), family_of(model).qkv
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


class Price(NamedTuple):
    """The least mass Σ c_i‖v_i‖ that writes a unit vector in one direction; at least one, by the triangle inequality."""

    direction: int
    """Row of the directions."""
    nonnegative: float
    """With c ≥ 0; infinite if the direction is outside of the cone of the dictionary."""
    signed: float
    """With signs free; infinite if it is outside of the dictionary's span."""
    ratio: float
    """nonnegative / signed: what nonnegativity costs."""
    prototypes: int
    """How many take part in the cheapest nonnegative writing."""


@torch.no_grad()
def write_price(dictionary: Readout | Tensor, directions: Tensor) -> Rows[Price]:
    """What each of ``directions`` (count, d) costs to write, dearest first: two linear programmes each,
    min Σ c_i‖v_i‖ subject to Vᵀc = u, with c ≥ 0 and with free signs (half a second each at 1024 prototypes of width 192).

    Args:
        dictionary: a record, or its rows (P, d).
        directions: taken at unit length; :func:`principal_directions` of a layer's outputs are the ones that matter to it.

    Raises:
        InputError: a direction is zero or of another width, or scipy is not installed.
    """
    v = (dictionary.dictionary if isinstance(dictionary, Readout) else dictionary).detach().double()
    u = directions.detach().double()
    if u.ndim != 2 or u.shape[1] != v.shape[1] or not (u.norm(dim=-1) > 0).all():
        raise InputError(
            f"found directions of shape {tuple(u.shape)}, expected rows of {v.shape[1]} numbers, none of them zero"
        )
    v = nn.functional.normalize(v[v.norm(dim=-1) > 0], dim=-1)  # the price of a unit vector is then one
    basis = span(v)
    coordinates, found = v @ basis.T, []
    u = nn.functional.normalize(u, dim=-1)
    for number, one in enumerate(u):
        target = basis @ one
        if (one - target @ basis).norm() > 10 * RANK:
            found.append(Price(number, math.inf, math.inf, math.inf, 0))
            continue
        c = minimise(torch.ones(len(v)), coordinates.T, target)
        if number and (one + u[number - 1]).norm() < RANK:
            free = found[-1].signed  # of the opposite direction: the same
        else:
            signed = minimise(torch.ones(2 * len(v)), torch.cat([coordinates, -coordinates]).T, target)
            if signed is None:
                raise InputError(f"found no writing of direction {number}, which the dictionary spans: scale the dictionary")
            free = signed.sum().item()
        price = math.inf if c is None else c.sum().item()
        found.append(Price(number, price, free, price / free, 0 if c is None else int((c > 1e-9).sum())))
    return Rows(sorted(found, key=lambda row: -row.nonnegative))


def principal_directions(outputs: Tensor, count: int = 8) -> Tensor:
    """(2·count, d) unit vectors: plus and minus each of the first principal directions of ``outputs`` (tokens, d) around their mean
    (fewer if the outputs span fewer), as +1, −1, +2, −2, …"""
    centred = outputs.detach().double().flatten(0, -2)
    first = span(centred - centred.mean(0))[:count]
    return torch.stack([first, -first], 1).flatten(0, 1)


def span(rows: Tensor) -> Tensor:
    """(rank, d) orthonormal rows that span those of ``rows`` (n, d), most important first."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return vectors[values > RANK * values[:1].clamp_min(1e-300)]


def minimise(cost: Tensor, equalities: Tensor, targets: Tensor) -> Tensor | None:
    """(n,) float64: a vertex of {x ≥ 0, equalities (m, n) x = targets (m,)} with the least cost (n,), by the dual simplex; None if
    there is no such x. InputError if scipy is not installed or the solver gives up."""
    try:
        from scipy.optimize import linprog
    except ImportError as error:
        raise InputError("linear programmes need scipy: pip install 'hf-kernel-ffn[read]'") from error
    arrays = [tensor.double().cpu().numpy() for tensor in (cost, equalities, targets)]
    result = linprog(arrays[0], A_eq=arrays[1], b_eq=arrays[2], method="highs-ds")
    if result.status == 2:
        return None
    if result.status != 0:
        raise InputError(f"found no solution of a linear programme, expected one: the solver says {result.message!r}")
    return torch.from_numpy(result.x).to(equalities.device)


def _like(ffn: KernelFFN) -> Tensor:
    """(1, d): an input of the layer."""
    weight = next(p for p in ffn.parameters() if p.is_floating_point())
    return weight.new_zeros(1, ffn.config.hidden_size)


def _gram(ffn: KernelFFN, rows: Tensor, bias: Tensor) -> Tensor:
    score, distance2 = scores(rows, bias, rows, bias)
    distance2.fill_diagonal_(0)
    parameters = {name: value.double() for name, value in ffn.kernel_parameters().items()}
    gram = ffn.kernel.value(score, distance2 if ffn.kernel.uses_distance else None, **parameters)
    return (gram + gram.T) / 2


def _square(gram: Tensor, written: Tensor) -> float:
    """tr(VᵀKV)."""
    return ((gram @ written) * written).sum().item()


def _written(ffn: KernelFFN) -> Tensor:
    """(P, d): output prototypes, the layer's scale inside."""
    return effective(ffn.output_prototypes, _like(ffn))[0].T.double() * ffn.positive("scale").double()


def _require_positive_definite(kernel: Kernel, what: str) -> None:
    if not kernel.positive_definite:
        raise InputError(
            f"found kernel {kernel.name!r}, which is not positive definite, expected one that is: without it there is no Hilbert "
            f"space and no {what}; convert with 'yat' for a one with it"
        )


def _require_function(ffn: KernelFFN) -> None:
    _require_positive_definite(ffn.kernel, "norm of the layer")
    settings = ffn.config.settings
    reason = None
    if settings.values != "fixed":
        reason = f"values {settings.values!r}: what a prototype writes changes with the input, so f is no expansion over fixed vectors"
    elif settings.intensity != "mass":
        reason = f"intensity {settings.intensity!r}: the shares are normalised, and a ratio of kernel sums is not in the space"
    elif settings.simplex != "softmax":
        reason = f"simplex {settings.simplex!r}: it strikes out prototypes by the input, so f is no fixed sum of kernels"
    elif not settings.coefficients_are_kernel:
        reason = f"temperature {settings.temperature}: κ^(1/τ) is in general not positive definite for τ ≠ 1"
    if reason:
        raise InputError(
            f"found a {ffn.kernel.name} layer with {reason}; expected simplex 'softmax', intensity 'mass', fixed values and τ = 1: use "
            "embedding_norms, which every layer with shares and a positive definite kernel has"
        )


def _embedded(ffn: KernelFFN, readout: Readout) -> Tensor:
    """(tokens, P) shares, if they have a kernel mean embedding at ``ffn``."""
    _require_positive_definite(ffn.kernel, "kernel mean embedding")
    if readout.shares is None:
        raise InputError("found a record without shares, expected one of a kernel readout: an untouched FFN has no embedding")
    if readout.shares.shape[-1] != ffn.config.prototypes:
        raise InputError(
            f"found shares over {readout.shares.shape[-1]} rows, expected the layer's {ffn.config.prototypes} prototypes: give a "
            "record of this layer"
        )
    return readout.shares.detach().double().flatten(0, -2)


def _affine(linear: nn.Module) -> Tensor:
    """(out, in), or (out, in + 1) with the bias as its last column: what acts on (x, 1)."""
    bias: Any = linear.bias
    weight = projection(linear)
    return (weight if bias is None else torch.cat([weight, bias.detach()[:, None]], 1)).double()


def _attention_inputs(model: Any, attention: nn.Module, ids: Tensor) -> Tensor:
    """(T, d): what the attention module reads."""
    kept = []
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append((args[0] if args else kwargs["hidden_states"])[0]), with_kwargs=True
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
