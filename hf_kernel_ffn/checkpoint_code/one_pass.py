"""The dense Yat readouts in one pass over chunks of tokens: Σ_i κ_i (u_i) v_i, or that over Σ_i κ_i, kernel values never held for all
tokens at once.

Same function as the plain form in operators.py, and in readout.py, which stays the reference. This file travels inside converted
checkpoints: it imports nothing but torch.
"""

import torch
from torch import Tensor, library

from .operators import (
    ARGUMENTS,
    TENSORS,
    chunks,
    differentiate,
    empty_gradients,
    namespace,
    score_dtype,
)

BLOCK = 2**16
"""Elements of a score matrix that elementwise work goes over at once on a CPU: what stays in its cache."""
NAMESPACE = namespace(__name__)
FAR = 2.0**40
"""A scale and its inverse up to this may divide squared distances without leaving float32."""


def yat_mixture(
    x, rows, bias, dictionary, epsilon, factor, up, up_bias, one_sided, mix, limit, convex
):
    """The function :func:`hf_kernel_ffn.checkpoint_code.operators.plain`, arguments as there, in chunks of tokens; differentiable. x·w (and u·x) are
    kept for the backward pass if they take no more than ``limit`` bytes, and computed again there otherwise."""
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad
        for t in (x, rows, bias, dictionary, epsilon, factor, up, up_bias)
    )
    return _mixture(
        x, rows, bias, dictionary, epsilon, factor, up, up_bias, one_sided, mix, limit, convex, keep
    )[0]


@library.custom_op(
    f"{NAMESPACE}::mixture",
    mutates_args=(),
    schema=f"({ARGUMENTS}, bool keep) -> (Tensor written, Tensor log_mass, Tensor dots, Tensor ups)",
)
def _mixture(
    x, rows, bias, dictionary, epsilon, factor, up, up_bias, one_sided, mix, limit, convex, keep
):
    """The mixture; what _Convex needs in the backward pass (N, 1); and the products (N, P), if they are kept."""
    terms = (_Convex if convex else _Conic)(x, rows, bias, epsilon, factor, up, up_bias, one_sided)
    keep = keep and _may_be_kept(x, rows, up, limit)
    written = x.new_empty(len(x), dictionary.shape[0], dtype=mix)
    mixed = dictionary.to(mix)
    dots = ups = None
    with torch.autocast(x.device.type, enabled=False):
        for part in (
            [slice(0, len(x))] if keep else chunks(len(x), limit, 2 * terms.bytes_per_token)
        ):
            dots, ups = terms.products(x[part])
            coefficients = terms.coefficients(
                part, dots, ups, torch.empty_like(dots) if keep else dots
            )
            torch.mm(coefficients.to(mix), mixed.T, out=written[part])
        terms.finish(written)
    kept = (terms.log_mass, *((dots, ups) if keep else (None, None)))
    return written, *(x.new_empty(0, dtype=terms.dtype) if t is None else t for t in kept)


def _may_be_kept(x, rows, up, limit):
    return (
        x.shape[0] * rows.shape[0] * score_dtype(x, rows).itemsize * (1 if up is None else 2)
        <= limit
    )


@_mixture.register_fake
def _(x, rows, bias, dictionary, epsilon, factor, up, up_bias, one_sided, mix, limit, convex, keep):
    keep, dtype = keep and _may_be_kept(x, rows, up, limit), score_dtype(x, rows)
    kept = (x.shape[0], rows.shape[0])
    return (
        x.new_empty(x.shape[0], dictionary.shape[0], dtype=mix),
        x.new_empty((x.shape[0], 1) if convex else 0, dtype=dtype),
        x.new_empty(kept if keep else 0, dtype=dtype),
        x.new_empty(kept if keep and up is not None else 0, dtype=dtype),
    )


@library.custom_op(
    f"{NAMESPACE}::mixture_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor written, Tensor log_mass, Tensor kept_dots, Tensor kept_ups, bool[] wanted, "
    f"{ARGUMENTS}, bool keep) -> ({', '.join(['Tensor'] * TENSORS)})",
)
def _mixture_backward(gradient, written, log_mass, kept_dots, kept_ups, wanted, x, rows, bias, dictionary, epsilon, factor, up,
                      up_bias, one_sided, mix, limit, convex, keep):  # fmt: skip
    """Gradients of the eight tensors among the arguments, empty where not wanted."""
    terms = (_Convex if convex else _Conic)(x, rows, bias, epsilon, factor, up, up_bias, one_sided)
    dtype, keep = terms.dtype, keep and _may_be_kept(x, rows, up, limit)
    with torch.autocast(x.device.type, enabled=False):
        gradient, mixed = gradient.to(mix), dictionary.to(mix)
        sums = _Sums(
            terms, (gradient.to(dtype) * written.to(dtype)).sum(-1, keepdim=True), log_mass
        )
        new = (
            torch.empty_like if len(x) else torch.zeros_like
        )  # the first chunk writes, the others add
        d_dictionary = new(mixed) if wanted[3] else None
        d_x = new(x, dtype=dtype) if wanted[0] else None
        d_rows = new(rows, dtype=dtype) if wanted[1] else None
        d_up = new(up, dtype=dtype) if up is not None and wanted[6] else None
        x_cast, rows_cast, up_cast = (
            x.to(dtype),
            rows.to(dtype),
            None if up is None else up.to(dtype),
        )
        for part in chunks(len(x), limit, 4 * terms.bytes_per_token):
            dots, ups = (
                (kept_dots[part], None if up is None else kept_ups[part])
                if keep
                else terms.products(x[part])
            )
            d_coefficient = (gradient[part] @ mixed).to(dtype)
            coefficient = torch.empty_like(d_coefficient)
            d_ups = None if up is None else torch.empty_like(d_coefficient)
            terms.backward(part, dots, ups, d_coefficient, coefficient, d_ups, sums)
            half, added = (
                d_coefficient,
                int(part.start > 0),
            )  # overwritten by half the gradient of x·w
            if d_dictionary is not None:
                d_dictionary.addmm_(gradient[part].T, coefficient.to(mix), beta=added)
            if d_rows is not None:
                d_rows.addmm_(half.T, x_cast[part], beta=added, alpha=2)
            if d_x is not None:
                d_x[part].addmm_(half, rows_cast, beta=0, alpha=2)
            if d_up is not None:
                d_up.addmm_(d_ups.T, x_cast[part], beta=added)
            if up is not None and d_x is not None:
                d_x[part].addmm_(d_ups, up_cast)
        per_token, per_row = sums.per_token / terms.inside, sums.per_row / terms.inside
        if d_x is not None:
            d_x.addcmul_(x_cast, per_token, value=-2)
        if d_rows is not None:
            d_rows.addcmul_(rows_cast, per_row[:, None], value=-2)
        d_epsilon = -(per_row.sum() + sums.touching / terms.inside)
        found = (
            d_x,
            d_rows,
            2 * sums.scores,
            d_dictionary,
            d_epsilon.reshape(1),
            terms.d_factor(sums).reshape(1),
            d_up,
            sums.ups,
        )
    like = (x, rows, bias, dictionary, epsilon, factor, up, up_bias)
    return tuple(
        x.new_empty(0) if t is None or not asked else g.to(t.dtype)
        for g, t, asked in zip(found, like, wanted, strict=True)
    )


@_mixture_backward.register_fake
def _(gradient, written, log_mass, kept_dots, kept_ups, wanted, x, *rest):
    return empty_gradients(x, (x, *rest[: TENSORS - 1]), wanted)


differentiate(_mixture, _mixture_backward)


def one_token(x, rows, bias, squares, epsilon, scale, one_sided):
    """scale · κ (P,) at one token x (d,) in as few operations as it takes, each of which costs more than its arithmetic; ``rows``
    (P, d), ``bias`` and ``squares`` = ‖w‖² (P,) in the dtype of x, at least float32; ``epsilon`` and ``scale`` plain numbers."""
    score = torch.mv(rows, x)
    denominator = (
        torch.add(squares, score, alpha=-2).add_(torch.dot(x, x)).clamp_min_(0).add_(epsilon)
    )
    score = score.add_(bias)
    score = score.relu_() if one_sided else score
    return torch.div(score, denominator).mul_(score).mul_(scale)


class _Sums:
    """What the backward pass of the elementwise part is given for each token, and the sums over a batch that it leaves behind."""

    def __init__(self, terms, mean, log_mass):
        count, prototypes = len(terms.square_x), len(terms.square_rows)
        new = terms.square_x.new_zeros
        self.mean, self.log_mass = (
            mean,
            log_mass,
        )  # Σ gradient · output (N, 1), and what _Convex says
        self.per_token, self.per_row = (
            new(count, 1),
            new(prototypes),
        )  # of −∂/∂‖x−w‖², times `inside`
        self.touching = new(
            ()
        )  # the same where rounding left no distance, of which ε alone has a gradient
        self.scores, self.ups = (
            new(prototypes),
            new(prototypes),
        )  # half the gradient of scores, and that of u·x
        self.entropy = new(())  # Σ (gradient of log π) · log π


def numbers_at_hand(tensor):
    """Whether plain numbers may be read off a tensor: elsewhere that would wait for the device."""
    return tensor.device.type == "cpu"


class _Terms:
    """What the elementwise part needs beside the products x·w, in the dtype that they are computed in: D = (‖x − w‖² + ε) / inside."""

    log_mass = None

    def __init__(self, x, rows, bias, epsilon, factor, up, up_bias, one_sided):
        self.dtype = score_dtype(x, rows)
        # A product of half-precision matrices that sums in float32 and leaves the sums there; only CUDA has it.
        self.native = x.is_cuda and x.dtype == rows.dtype != self.dtype
        self.rows, self.up = rows if self.native else rows.to(self.dtype), up
        if up is not None and not self.native:
            self.up = up.to(self.dtype)
        self.bias, self.up_bias = (
            bias.to(self.dtype),
            None if up_bias is None else up_bias.to(self.dtype),
        )
        self.inside, epsilon = 1.0, epsilon.to(self.dtype)
        self.at_hand = numbers_at_hand(x)
        self.take(factor)
        self.least = epsilon.item() / self.inside if self.at_hand else epsilon
        self.square_x = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.dtype).square()
            / self.inside
        )
        # From the weight in use at every call: a norm kept from earlier would be wrong after a step or an adapter.
        square_rows = torch.linalg.vector_norm(rows, dim=-1, dtype=self.dtype).square()
        self.square_rows = (square_rows + epsilon) / self.inside
        self.one_sided = one_sided
        self.bytes_per_token = len(rows) * self.dtype.itemsize * (1 if up is None else 2)

    def products(self, x):
        """x·w, without b, of which a small distance would keep the rounding; and u·x if values are gated: (n, P) each, new memory."""
        return self._product(x, self.rows, None), None if self.up is None else self._product(
            x, self.up, self.up_bias
        )

    def _product(self, x, weight, bias):
        if self.native:
            product = torch.mm(x, weight.T, out_dtype=self.dtype)
            return product if bias is None else product.add_(bias)
        return torch.nn.functional.linear(x.to(self.dtype), weight, bias)

    def denominator_and_score(self, part, dots):
        """D, less than ``least`` where rounding left it so, and x·w + b, or what is positive of it."""
        score = dots + self.bias
        return torch.add(self.square_x[part], self.square_rows).add_(
            dots, alpha=-2 / self.inside
        ), (score.clamp_min_(0) if self.one_sided else score)

    def collect(self, gradient, far, apart, here, sums):
        """Half the gradient of x·w in place of half that of scores; ``far``: −∂/∂D, overwritten."""
        sums.scores += gradient.sum(0)
        if apart is not None:
            sums.touching += far.masked_fill(apart, 0).sum()
            far.mul_(apart)
        gradient.add_(far, alpha=1 / self.inside)
        sums.per_token[here] = far.sum(-1, keepdim=True)
        sums.per_row += far.sum(0)

    def cut(self, denominator):
        """``denominator`` is no less than ``least`` any more; where it was so before, or None: everywhere."""
        apart = (
            None if self.at_hand and denominator.amin() >= self.least else denominator >= self.least
        )
        denominator.clamp_min_(self.least)
        return apart


class _Conic(_Terms):
    """scale · κ. On a CPU the scale goes inside, where it costs nothing: scale · κ = s · (s / D) with D = (‖x − w‖² + ε) / scale."""

    def take(self, scale):
        self.scale = self.outside = scale.to(self.dtype)
        if self.at_hand:
            scale = self.outside.item()
            self.inside = min(max(scale, 1 / FAR), FAR)
            self.outside = scale / self.inside
        self.all_inside = self.at_hand and self.outside == 1

    def coefficients(self, part, dots, ups, out):
        """scale · κ · u over the tokens ``part``, into ``out``, which may be ``dots`` itself."""
        for here, rows in _blocks(dots, part):
            denominator, score = self.denominator_and_score(here, dots[rows])
            torch.div(score, denominator.clamp_min_(self.least), out=denominator)
            target = torch.mul(score, denominator, out=out[rows])
            if not self.all_inside:
                target.mul_(self.outside)
            if ups is not None:
                target.mul_(ups[rows])
        return out

    def finish(self, written):
        """Nothing is left to do to the output."""

    def backward(self, part, dots, ups, d_coefficient, coefficient, d_ups, sums):
        """From the gradient of the coefficients to half that of x·w, in its place; fills ``coefficient`` and ``d_ups``."""
        for here, rows in _blocks(dots, part):
            gradient = d_coefficient[rows]
            denominator, score = self.denominator_and_score(here, dots[rows])
            apart = self.cut(denominator)
            share = torch.div(score, denominator, out=denominator)
            kernel = torch.mul(score, share, out=coefficient[rows])
            if not self.all_inside:
                kernel.mul_(self.outside)
            if ups is not None:
                torch.mul(gradient, kernel, out=d_ups[rows])
                gradient.mul_(ups[rows])
                kernel.mul_(ups[rows])
                sums.ups += d_ups[rows].sum(0)
            gradient.mul_(share)
            if not self.all_inside:
                gradient.mul_(self.outside)
            self.collect(gradient, torch.mul(gradient, share, out=share), apart, here, sums)

    def d_factor(self, sums):
        return sums.mean.sum() / self.scale  # the output is proportional to the scale


class _Convex(_Terms):
    """π = softmax(log κ / τ): κ^(1/τ) relative to the token's largest, the sum of which divides the product."""

    def __init__(self, x, *rest):
        super().__init__(x, *rest)
        self.mass, self.log_mass = torch.empty_like(self.square_x), torch.empty_like(self.square_x)

    def take(self, temperature):
        self.temperature = temperature.item() if self.at_hand else temperature.to(self.dtype)

    def coefficients(self, part, dots, ups, out):
        """κ^(1/τ) · u over the tokens ``part``, relative to the largest κ^(1/τ), into ``out``, which may be ``dots`` itself."""
        for here, rows in _blocks(dots, part):
            denominator, score = self.denominator_and_score(here, dots[rows])
            denominator.clamp_min_(self.least)
            target = (
                torch.mul(score, score, out=out[rows])
                .div_(denominator)
                .log_()
                .div_(self.temperature)
            )
            best = target.amax(-1, keepdim=True)
            best = best.where(best != -torch.inf, torch.zeros_like(best))
            mass = target.sub_(best).exp_().sum(-1, keepdim=True)
            fires = mass > 0
            self.mass[here] = mass.where(fires, torch.ones_like(mass))
            self.log_mass[here] = (best + mass.log()).where(fires, torch.full_like(mass, torch.inf))
            if ups is not None:
                target.mul_(ups[rows])
        return out

    def finish(self, written):
        written.div_(self.mass)

    def backward(self, part, dots, ups, d_coefficient, coefficient, d_ups, sums):
        """As that of :class:`_Conic`; ``coefficient`` is filled with π · u."""
        for here, rows in _blocks(dots, part):
            gradient = d_coefficient[rows]
            denominator, score = self.denominator_and_score(here, dots[rows])
            apart = self.cut(denominator)
            log_pi = (
                torch.mul(score, score)
                .div_(denominator)
                .log_()
                .div_(self.temperature)
                .sub_(sums.log_mass[here])
            )
            pi = torch.exp(log_pi, out=coefficient[rows])
            if ups is not None:
                torch.mul(gradient, pi, out=d_ups[rows])
                gradient.mul_(ups[rows])
                sums.ups += d_ups[rows].sum(0)
            gradient.sub_(sums.mean[here]).mul_(pi)
            if ups is not None:
                pi.mul_(ups[rows])
            sums.entropy += log_pi.clamp_min_(torch.finfo(self.dtype).min).mul_(gradient).sum()
            gradient.div_(self.temperature)
            far = torch.div(gradient, denominator, out=denominator)
            gradient.div_(score.add_(score == 0))  # what does not fire has no gradient
            self.collect(gradient, far, apart, here, sums)

    def d_factor(self, sums):
        return -sums.entropy / self.temperature


def _blocks(matrix: Tensor, part: slice):
    """For each run of rows of ``matrix``, which are the tokens ``part``, that fits the cache (all of them on a device): the slice of all
    tokens, and that of the matrix."""
    rows = max(1, len(matrix) if matrix.device.type != "cpu" else BLOCK // matrix.shape[1])
    for low in range(0, len(matrix), rows):
        high = min(low + rows, len(matrix))
        yield slice(part.start + low, part.start + high), slice(low, high)
