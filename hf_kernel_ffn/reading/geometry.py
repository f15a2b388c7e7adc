"""The geometry that a kernel brings: Gram matrices, norms and distances.

Each is given where it is defined, and refused by name where not. Positive definiteness makes a
reproducing kernel Hilbert space, and nonnegativity makes a mixture; they are independent. A layer
is a function in that space only if nothing stands between kernel and output (no normalisation, no
truncation, no gate). What a normalised readout has there is one token's kernel mean embedding
Σ π_i κ(·, w_i). All figures are in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.kernels import Kernel
from ..checkpoint_code.linears import get_effective_weight
from ..checkpoint_code.record import Readout
from ..checkpoint_code.settings import KernelFFNConfig
from ..checkpoint_code.tied import AnyKernelFFN, TiedKernelFFN
from .model_parts import has_tied_rows

DIGITS = 9
"""Decimals to which the parameters of one space agree."""


def prototypes_of(ffn: AnyKernelFFN) -> tuple[Tensor, Tensor]:
    """(P, d) rows w_i and (P,) b_i (zero for a kernel without) in float64, adapters included."""
    weight, bias = get_effective_weight(ffn.input_prototypes, _like(ffn))
    rows = weight.detach().double()
    return rows, rows.new_zeros(len(rows)) if bias is None else bias.detach().double()


def scores(points: Tensor, heights: Tensor, rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What a kernel sees between augmented points (x, t) and prototypes (w, b).

    An input of the layer stands at height t = 1, a prototype at its own b.

    Args:
        points: (points, d) x.
        heights: (points,) t.
        rows: (P, d) w.
        bias: (P,) b.

    Returns:
        x·w + t·b and ‖x − w‖², (points, P) each.
    """
    dot = points @ rows.T
    distance2 = points.square().sum(-1, keepdim=True) + rows.square().sum(-1) - 2 * dot
    return dot + heights[:, None] * bias, distance2.clamp_min(0)


@torch.no_grad()
def prototype_kernel(ffn: KernelFFN) -> Tensor:
    """(P, P) K_ij = κ((w_i, b_i), (w_j, b_j)): how alike a layer's prototypes are to its kernel.

    Positive semi-definite if the kernel is positive definite, up to rounding.
    """
    reason = _why_it_is_no_function(ffn.config.settings)
    if reason is not None and has_tied_rows(ffn):
        raise InputError(f"found {reason}")
    return _make_gram(ffn, *prototypes_of(ffn))


@torch.no_grad()
def function_norm(ffn: AnyKernelFFN) -> float:
    """The squared norm ‖f‖² = tr(VᵀKV) of a layer as a function f = Σ κ(·, w_i) v_i.

    With the kernel ``brownian`` every unit has a kernel of its own, between the places of inputs in
    its plane, and ‖f‖² is the sum of :func:`unit_norms`.

    The layer's scale is inside v, and b_out is left out. f is taken on augmented points, the
    layer's inputs being those at height one: over these alone the least norm can only be smaller
    (Aronszajn 1950, restriction of a kernel).

    Raises:
        InputError: f is not in the kernel's space: the kernel is not positive definite, the
            readout is normalised, gated, truncated or at another temperature than one; the message
            names which.
    """
    if has_tied_rows(ffn) and ffn.kernel.uses_knot:
        return unit_norms(ffn).sum().item()
    _require_function(ffn)
    rows, bias = prototypes_of(ffn)
    return _measure_square(_make_gram(ffn, rows, bias), _read_outputs(ffn))


@torch.no_grad()
def unit_norms(ffn: TiedKernelFFN) -> Tensor:
    """(units,) ‖f_i‖² ‖v_i‖² of the functions that a layer of knots is the sum of.

    f_i = Σ_p a_p κ(g·x, c_p) is in the space of the Brownian covariance, with ‖f_i‖² = aᵀ K a and
    K_pq = min(|c_p|, |c_q|) for knots on one side of zero, 0 for others (Mörters and Peres 2010,
    §1.1). Values that are a product multiply it by κ(u·x, far) − κ(u·x, −far), whose squared norm
    is 2·far: norms of products are products of norms (Aronszajn 1950, §8).

    Raises:
        InputError: the layer has no knots.
    """
    if not (has_tied_rows(ffn) and ffn.kernel.uses_knot):
        raise InputError(
            f"found a {ffn.kernel.name} layer, expected one whose pieces have knots: convert with "
            "rows 'tied' and kernel 'brownian'"
        )
    knot = ffn.pieces["knot"].double().T
    amount = (ffn.pieces["amount"].double() * ffn.positive("scale").double()).T
    gram = ffn.kernel.value(knot[:, :, None], None, knot=knot[:, None])
    squares = torch.einsum("up,upq,uq->u", amount, gram, amount)
    if ffn.config.settings.values == "product":
        squares = squares * (2 * ffn.config.reference["far"])
    outputs, _ = get_effective_weight(ffn.output_prototypes, _like(ffn))
    return squares * outputs.double().square().sum(0)


@torch.no_grad()
def function_distance(ffn_a: KernelFFN, ffn_b: KernelFFN) -> float:
    """‖f_a − f_b‖ in the one space of two layers.

    Raises:
        InputError: as :func:`function_norm`, or the spaces differ: other kernels, other parameters
            or another hidden_size.
    """
    for ffn in (ffn_a, ffn_b):
        _require_function(ffn)
    spaces = [_describe_space(ffn) for ffn in (ffn_a, ffn_b)]
    if spaces[0] != spaces[1]:
        raise InputError(
            f"found layers in the spaces of {spaces[0]} and {spaces[1]} (kernel, hidden_size, "
            "parameters), expected one space: norms of two kernels cannot be compared; compare "
            "outputs instead"
        )
    # One expansion over both sets of prototypes, the second written with the opposite sign.
    rows_a, bias_a = prototypes_of(ffn_a)
    rows_b, bias_b = prototypes_of(ffn_b)
    gram = _make_gram(ffn_a, torch.cat([rows_a, rows_b]), torch.cat([bias_a, bias_b]))
    square = _measure_square(gram, torch.cat([_read_outputs(ffn_a), -_read_outputs(ffn_b)]))
    return math.sqrt(max(0.0, square))


def _describe_space(ffn: KernelFFN) -> tuple[str, int, dict[str, float]]:
    """Kernel, hidden_size and parameters, which are a kernel's space."""
    parameters = {
        name: round(value.item(), DIGITS) for name, value in ffn.kernel_parameters().items()
    }
    return ffn.kernel.name, ffn.config.hidden_size, parameters


@torch.no_grad()
def embedding_norms(ffn: KernelFFN, readout: Readout) -> Tensor:
    """(tokens,) πᵀKπ: the squared norm of each token's kernel mean embedding Σ π_i κ(·, w_i).

    Readouts with a truncated map, a gate or gated values have one as well: it asks for shares only.

    Raises:
        InputError: the kernel is not positive definite, or there are no shares.
    """
    shares = _require_embeddings(ffn, readout)
    return ((shares @ prototype_kernel(ffn)) * shares).sum(-1)


@torch.no_grad()
def embedding_distances(ffn: KernelFFN, a: Readout, b: Readout) -> Tensor:
    """(tokens of a, tokens of b) ‖Σ π_a κ(·, w) − Σ π_b κ(·, w)‖, both read at ``ffn``.

    This is the maximum mean discrepancy between the tokens' mixtures of prototypes (Gretton et al.
    2012, JMLR 13:723, lemma 4). InputError as :func:`embedding_norms`.
    """
    shares_a = _require_embeddings(ffn, a)
    shares_b = _require_embeddings(ffn, b)
    # Coordinates in the span of the prototypes' sections: distances there are exactly zero,
    # symmetric and triangular.
    values, vectors = torch.linalg.eigh(prototype_kernel(ffn))
    root = vectors * values.clamp_min(0).sqrt()
    return torch.cdist(
        shares_a @ root, shares_b @ root, compute_mode="donot_use_mm_for_euclid_dist"
    )


def token_geometry(readout: Readout) -> Tensor:
    """(tokens, tokens) cosines between what tokens use: coefficients c_i weighted by ‖v_i‖.

    Defined for every record, so that converted layers, teachers and heads can be compared; one
    with a positive definite kernel has :func:`embedding_distances` too.
    """
    lengths = readout.dictionary.detach().double().norm(dim=-1)
    weighted = readout.coefficients.detach().double() * lengths
    unit = nn.functional.normalize(weighted.flatten(0, -2), dim=-1)
    return unit @ unit.T


def _like(ffn: AnyKernelFFN) -> Tensor:
    """(1, d): an input of the layer."""
    weight = next(parameter for parameter in ffn.parameters() if parameter.is_floating_point())
    return weight.new_zeros(1, ffn.config.hidden_size)


def _make_gram(ffn: AnyKernelFFN, rows: Tensor, bias: Tensor) -> Tensor:
    """(P, P) the kernel of ``ffn`` between prototypes with ``rows`` (P, d) and ``bias`` (P,)."""
    score, distance2 = scores(rows, bias, rows, bias)
    distance2.fill_diagonal_(0)
    parameters = {name: value.double() for name, value in ffn.kernel_parameters().items()}
    gram = ffn.kernel.value(score, distance2 if ffn.kernel.uses_distance else None, **parameters)
    return (gram + gram.T) / 2


def _measure_square(gram: Tensor, outputs: Tensor) -> float:
    """tr(VᵀKV)."""
    return ((gram @ outputs) * outputs).sum().item()


def _read_outputs(ffn: AnyKernelFFN) -> Tensor:
    """(P, d): output prototypes, the layer's scale inside."""
    weight, _ = get_effective_weight(ffn.output_prototypes, _like(ffn))
    return weight.T.double() * ffn.positive("scale").double()


def _require_positive_definite(kernel: Kernel, what: str) -> None:
    """InputError unless ``kernel`` is positive definite, which ``what`` needs."""
    if not kernel.positive_definite:
        raise InputError(
            f"found kernel {kernel.name!r}, which is not positive definite, expected one that is: "
            f"without it there is no Hilbert space and no {what}; convert with kernel "
            "'brownian' or 'yat', which have one"
        )


def _require_function(ffn: AnyKernelFFN) -> None:
    """InputError unless ``ffn`` is a function in its kernel's space."""
    _require_positive_definite(ffn.kernel, "norm of the layer")
    reason = _why_it_is_no_function(ffn.config.settings)
    if reason:
        raise InputError(
            f"found a {ffn.kernel.name} layer with {reason}; expected simplex 'softmax', intensity "
            "'mass', fixed values and τ = 1: use embedding_norms, which every layer with shares "
            "and a positive definite kernel has"
        )


def _why_it_is_no_function(settings: KernelFFNConfig) -> str | None:
    """Which of ``settings`` stands between the kernel and the output, and what it does there."""
    if getattr(settings, "rows", "free") == "tied":
        return (
            "rows 'tied': a unit's kernels stand at pieces of its plane, of which the layer keeps "
            "no rows; convert with rows 'free'"
        )
    if settings.values != "fixed":
        return (
            f"values {settings.values!r}: what a prototype writes changes with the input, so f is "
            "no expansion over fixed vectors"
        )
    if settings.intensity != "mass":
        return (
            f"intensity {settings.intensity!r}: the shares are normalised, and a ratio of kernel "
            "sums is not in the space"
        )
    if settings.simplex != "softmax":
        return (
            f"simplex {settings.simplex!r}: it strikes out prototypes by the input, so f is no "
            "fixed sum of kernels"
        )
    if not settings.coefficients_are_kernel:
        return (
            f"temperature {settings.temperature}: κ^(1/τ) is in general not positive definite "
            "for τ ≠ 1"
        )
    return None


def _require_embeddings(ffn: KernelFFN, readout: Readout) -> Tensor:
    """(tokens, P) shares; InputError unless they have a kernel mean embedding at ``ffn``."""
    _require_positive_definite(ffn.kernel, "kernel mean embedding")
    if readout.shares is None:
        raise InputError(
            "found a record without shares, expected one of a kernel readout: an untouched FFN has "
            "no embedding"
        )
    if readout.shares.shape[-1] != ffn.config.prototypes:
        raise InputError(
            f"found shares over {readout.shares.shape[-1]} rows, expected the layer's "
            f"{ffn.config.prototypes} prototypes: give a record of this layer"
        )
    return readout.shares.detach().double().flatten(0, -2)
