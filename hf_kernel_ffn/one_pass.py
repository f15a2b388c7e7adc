"""The dense Yat readouts in one pass over chunks of tokens: Σ_i κ_i (u_i) v_i, kernel values never held for all tokens at once.

Same function as the plain form in readout.py, which stays the reference. This file travels inside converted checkpoints: it
imports nothing but torch.
"""

import torch
from torch import Tensor

BLOCK = 2**16
"""Elements of a score matrix that elementwise work goes over at once on a CPU: what stays in its cache."""


FAR = 2.0**40
"""A scale and its inverse up to this may divide squared distances without leaving float32."""


class YatMixture(torch.autograd.Function):
    """``Σ_i scale · κ_i(x) · u_i(x) · v_i``, with κ = s² / (‖x − w‖² + ε), or relu(s)² in place of s² (half-yat).

    Arguments: x (N, d); rows (P, d) and bias (P,); dictionary (d, P), columns v_i; epsilon, log_scale (1,), at least float32; up
    (P, d) and up_bias (P,), or None where u_i = 1; one_sided: half-yat; mix: the dtype of the second product; limit: bytes
    that a temporary may take, and that may be kept for the backward pass: beyond it, scores are computed again there.
    Returns (N, d) in ``mix``.
    """

    @staticmethod
    def forward(ctx, x, rows, bias, dictionary, epsilon, log_scale, up, up_bias, one_sided, mix, limit):
        ctx.one_sided, ctx.mix, ctx.limit = one_sided, mix, limit
        terms = _Terms(x, rows, bias, epsilon, log_scale, up, up_bias, one_sided)
        ctx.kept = any(ctx.needs_input_grad) and len(x) * terms.bytes_per_token <= limit
        written = x.new_empty(len(x), dictionary.shape[0], dtype=mix)
        mixed = dictionary.to(mix)
        dots = ups = None
        with torch.autocast(x.device.type, enabled=False):
            for part in [slice(0, len(x))] if ctx.kept else _chunks(len(x), limit, 2 * terms.bytes_per_token):
                dots, ups = terms.products(x[part])
                kernel = terms.kernel(part, dots, ups, torch.empty_like(dots) if ctx.kept else dots)
                torch.mm(kernel.to(mix), mixed.T, out=written[part])
        kept = (dots, ups) if ctx.kept else (None, None)
        ctx.save_for_backward(x, rows, bias, dictionary, epsilon, log_scale, up, up_bias, written, *kept)
        return written

    @staticmethod
    def backward(ctx, gradient):
        with torch.autocast(gradient.device.type, enabled=False):
            if torch.is_grad_enabled():  # a graph of the gradient itself is asked for: by way of the plain form
                inputs = [t for t, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad) if wanted]
                output = plain(*ctx.saved_tensors[:8], ctx.one_sided, ctx.mix)
                found = iter(torch.autograd.grad(output, inputs, gradient, create_graph=True))
                return tuple(next(found) if wanted else None for wanted in ctx.needs_input_grad)
            return YatMixture._backward(ctx, gradient)

    @staticmethod
    def _backward(ctx, gradient):
        x, rows, bias, dictionary, epsilon, log_scale, up, up_bias, written, kept_dots, kept_ups = ctx.saved_tensors
        terms = _Terms(x, rows, bias, epsilon, log_scale, up, up_bias, ctx.one_sided)
        wanted, dtype = ctx.needs_input_grad, terms.dtype
        sums = _Sums(terms)
        gradient = gradient.to(ctx.mix)
        mixed = dictionary.to(ctx.mix)
        new = torch.empty_like if len(x) else torch.zeros_like  # the first chunk writes, the others add
        d_dictionary = new(mixed) if wanted[3] else None
        d_x = new(x, dtype=dtype) if wanted[0] else None
        d_rows = new(rows, dtype=dtype) if wanted[1] else None
        d_up = new(up, dtype=dtype) if up is not None and wanted[6] else None
        x_cast, rows_cast, up_cast = x.to(dtype), rows.to(dtype), None if up is None else up.to(dtype)
        for part in _chunks(len(x), ctx.limit, 4 * terms.bytes_per_token):
            dots, ups = (kept_dots[part], None if up is None else kept_ups[part]) if ctx.kept else terms.products(x[part])
            d_coefficient = (gradient[part] @ mixed).to(terms.dtype)
            coefficient = torch.empty_like(d_coefficient)
            d_ups = None if up is None else torch.empty_like(d_coefficient)
            terms.backward(part, dots, ups, d_coefficient, coefficient, d_ups, sums)
            half, added = d_coefficient, int(part.start > 0)  # overwritten by half the gradient of x·w
            if d_dictionary is not None:
                d_dictionary.addmm_(gradient[part].T, coefficient.to(ctx.mix), beta=added)
            if d_rows is not None:
                d_rows.addmm_(half.T, x_cast[part], beta=added, alpha=2)
            if d_x is not None:
                d_x[part].addmm_(half, rows_cast, beta=0, alpha=2)
            if up is not None:
                if d_up is not None:
                    d_up.addmm_(d_ups.T, x_cast[part], beta=added)
                if d_x is not None:
                    d_x[part].addmm_(d_ups, up_cast)
        per_token, per_row = sums.per_token / terms.inside, sums.per_row / terms.inside
        if d_x is not None:
            d_x.addcmul_(x_cast, per_token, value=-2)
        if d_rows is not None:
            d_rows.addcmul_(rows_cast, per_row[:, None], value=-2)
        d_epsilon = -(per_row.sum() + sums.touching / terms.inside)
        d_log_scale = (gradient.to(dtype) * written.to(dtype)).sum()  # the output is proportional to the scale
        found = (
            d_x, d_rows, 2 * sums.scores, d_dictionary, d_epsilon.reshape(1), d_log_scale.reshape(1), d_up,
            None if up is None else sums.ups,
        )  # fmt: skip
        like = (x, rows, bias, dictionary, epsilon, log_scale, up, up_bias)
        return (*(None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, like)), None, None, None)


def one_token(x, rows, bias, squares, epsilon, scale, one_sided):
    """scale · κ (P,) at one token x (d,) in as few operations as it takes, each of which costs more than its arithmetic; ``rows``
    (P, d), ``bias`` and ``squares`` = ‖w‖² (P,) in the dtype of x, at least float32; ``epsilon`` and ``scale`` plain numbers."""
    score = torch.mv(rows, x)
    denominator = torch.add(squares, score, alpha=-2).add_(torch.dot(x, x)).clamp_min_(0).add_(epsilon)
    score = score.add_(bias)
    score = score.relu_() if one_sided else score
    return torch.div(score, denominator).mul_(score).mul_(scale)


def plain(x, rows, bias, dictionary, epsilon, log_scale, up, up_bias, one_sided, mix):
    """The same function in plain torch: what double backward differentiates."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, rows.dtype), torch.float32)
    dot = torch.nn.functional.linear(x.to(dtype), rows.to(dtype))
    square = x.to(dtype).square().sum(-1, keepdim=True) + rows.to(dtype).square().sum(-1)
    distance = (square - 2 * dot).clamp_min(0)
    score = dot + bias.to(dtype)
    score = score.relu() if one_sided else score
    kernel = score * (score / (distance + epsilon.to(dtype))) * log_scale.exp().to(dtype)
    if up is not None:
        kernel = kernel * torch.nn.functional.linear(x.to(dtype), up.to(dtype), None if up_bias is None else up_bias.to(dtype))
    return kernel.to(mix) @ dictionary.to(mix).T


class _Sums:
    """Sums over a batch that the backward pass of the elementwise part leaves behind."""

    def __init__(self, terms):
        count, prototypes = len(terms.square_x), len(terms.square_rows)
        new = terms.square_x.new_zeros
        self.per_token, self.per_row = new(count, 1), new(prototypes)  # of −∂/∂‖x−w‖², times `inside`
        self.touching = new(())  # the same where rounding left no distance, of which ε alone has a gradient
        self.scores, self.ups = new(prototypes), new(prototypes)  # half the gradient of scores, and that of u·x


class _Terms:
    """What the elementwise part needs beside the products x·w, in the dtype that they are computed in.

    On a CPU the kernel's scale goes inside, where it costs nothing: scale · κ = s · (s / D) with D = (‖x − w‖² + ε) / scale.
    """

    def __init__(self, x, rows, bias, epsilon, log_scale, up, up_bias, one_sided):
        self.dtype = torch.promote_types(torch.promote_types(x.dtype, rows.dtype), torch.float32)
        # A product of half-precision matrices that sums in float32 and leaves the sums there; only CUDA has it.
        self.native = x.is_cuda and x.dtype == rows.dtype != self.dtype
        self.rows, self.up = rows if self.native else rows.to(self.dtype), up
        if up is not None and not self.native:
            self.up = up.to(self.dtype)
        self.bias, self.up_bias = bias.to(self.dtype), None if up_bias is None else up_bias.to(self.dtype)
        epsilon, scale = epsilon.to(self.dtype), log_scale.exp().to(self.dtype)
        self.inside = 1.0
        self.outside, self.least = scale, epsilon
        if x.device.type == "cpu":  # plain numbers are at hand; elsewhere reading one would wait for the device
            self.inside = min(max(scale.item(), 1 / FAR), FAR)
            self.outside, self.least = scale.item() / self.inside, epsilon.item() / self.inside
        self._all_inside = x.device.type == "cpu" and self.outside == 1
        self.square_x = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.dtype).square() / self.inside
        # From the weight in use at every call: a norm kept from earlier would be wrong after a step or an adapter.
        square_rows = torch.linalg.vector_norm(rows, dim=-1, dtype=self.dtype).square()
        self.square_rows = (square_rows + epsilon) / self.inside
        self.one_sided = one_sided
        self.bytes_per_token = len(rows) * self.dtype.itemsize * (1 if up is None else 2)

    def products(self, x):
        """x·w, without b, of which a small distance would keep the rounding; and u·x if values are gated: (n, P) each, new memory."""
        return self._product(x, self.rows, None), None if self.up is None else self._product(x, self.up, self.up_bias)

    def _product(self, x, weight, bias):
        if self.native:
            product = torch.mm(x, weight.T, out_dtype=self.dtype)
            return product if bias is None else product.add_(bias)
        return torch.nn.functional.linear(x.to(self.dtype), weight, bias)

    def _denominator_and_score(self, part, dots):
        """D, less than ``least`` where rounding left it so, and x·w + b, or what is positive of it."""
        score = dots + self.bias
        return torch.add(self.square_x[part], self.square_rows).add_(dots, alpha=-2 / self.inside), (
            score.clamp_min_(0) if self.one_sided else score
        )

    def kernel(self, part, dots, ups, out):
        """scale · κ · u over the tokens ``part``, into ``out``, which may be ``dots`` itself."""
        for low, rows in _blocks(dots):
            dot, target = dots[rows], out[rows]
            denominator, score = self._denominator_and_score(slice(part.start + low, part.start + low + len(dot)), dot)
            torch.div(score, denominator.clamp_min_(self.least), out=denominator)
            torch.mul(score, denominator, out=target)
            if not self._all_inside:
                target.mul_(self.outside)
            if ups is not None:
                target.mul_(ups[rows])
        return out

    def backward(self, part, dots, ups, d_coefficient, coefficient, d_ups, sums):
        """From the gradient of the coefficients to half that of x·w, in its place; fills ``coefficient`` and ``d_ups``."""
        for low, rows in _blocks(dots):
            dot, gradient = dots[rows], d_coefficient[rows]
            here = slice(part.start + low, part.start + low + len(dot))
            denominator, score = self._denominator_and_score(here, dot)
            apart = None if dot.device.type == "cpu" and denominator.amin() >= self.least else denominator >= self.least
            share = torch.div(score, denominator.clamp_min_(self.least), out=denominator)
            kernel = torch.mul(score, share, out=coefficient[rows])
            if not self._all_inside:
                kernel.mul_(self.outside)
            if ups is not None:
                torch.mul(gradient, kernel, out=d_ups[rows])
                gradient.mul_(ups[rows])
                kernel.mul_(ups[rows])
                sums.ups += d_ups[rows].sum(0)
            gradient.mul_(share)
            if not self._all_inside:
                gradient.mul_(self.outside)
            far = torch.mul(gradient, share, out=share)  # −∂/∂‖x − w‖², times `inside`
            sums.scores += gradient.sum(0)
            if apart is not None:
                sums.touching += far.masked_fill(apart, 0).sum()
                far.mul_(apart)
            gradient.add_(far, alpha=1 / self.inside)
            sums.per_token[here] = far.sum(-1, keepdim=True)
            sums.per_row += far.sum(0)


def _blocks(matrix: Tensor):
    """First row and slice of each run of rows of ``matrix`` that fits the cache; all of it on a device."""
    rows = len(matrix) if matrix.device.type != "cpu" else max(1, BLOCK // matrix.shape[1])
    for low in range(0, len(matrix), rows):
        yield low, slice(low, low + rows)


def _chunks(count: int, limit: int, bytes_per_token: int):
    """Slices of ``count`` tokens whose temporaries take at most ``limit`` bytes together; equal ones."""
    number = -(-count * bytes_per_token // limit)
    size = max(1, -(-count // max(1, number)))
    for low in range(0, count, size):
        yield slice(low, min(low + size, count))
