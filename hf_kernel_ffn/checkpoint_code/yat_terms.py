"""The elementwise part of a dense Yat readout: from products x·w to coefficients, and back.

Everything works in place where it can, since on a CPU memory traffic is what it costs.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .operators import MixtureArguments, score_dtype

BLOCK = 2**16
"""Elements of a score matrix that a CPU works on at once: they stay in its cache."""
FAR = 2.0**40
"""A scale and its inverse up to this may divide squared distances without leaving float32."""


def make_terms(given: MixtureArguments) -> YatTerms:
    """The elementwise part of the mixture ``given``."""
    return ConvexTerms(given) if given.convex else ConicTerms(given)


class BackwardSums:
    """What the elementwise backward pass is given for each token, and the sums that it leaves."""

    def __init__(self, terms: YatTerms, mean: Tensor, log_mass: Tensor):
        new_zeros = terms.square_x.new_zeros
        count = len(terms.square_x)
        prototypes = len(terms.square_rows)
        self.mean = mean
        """(N, 1) Σ gradient · output."""
        self.log_mass = log_mass
        """(N, 1) what ConvexTerms found in the forward pass."""
        self.per_token = new_zeros(count, 1)
        """Of −∂/∂‖x − w‖² times ``inside``, over prototypes."""
        self.per_row = new_zeros(prototypes)
        """The same, over tokens."""
        self.touching = new_zeros(())
        """The same where rounding left no distance, of which ε alone has a gradient."""
        self.scores = new_zeros(prototypes)
        """Half the gradient of the scores, over tokens."""
        self.ups = new_zeros(prototypes)
        """The gradient of u·x, over tokens."""
        self.entropy = new_zeros(())
        """Σ (gradient of log π) · log π."""


def numbers_at_hand(tensor: Tensor) -> bool:
    """Whether reading a number off ``tensor`` is free; off a device, it would wait for it."""
    return tensor.device.type == "cpu"


class YatTerms:
    """The elementwise part between the products x·w and the coefficients.

    It works in ``dtype`` on scores s = x·w + b and on D = (‖x − w‖² + ε) / inside.
    """

    inside = 1.0
    """What D is divided by: of a conic readout's scale, what float32 may hold."""
    log_mass: Tensor | None = None
    """(N, 1), of a convex readout."""

    def __init__(self, given: MixtureArguments):
        x = given.x
        rows = given.rows
        self.dtype = score_dtype(x, rows)
        self.one_sided = given.one_sided
        number = 1 if given.up is None else 2
        self.bytes_per_token = len(rows) * self.dtype.itemsize * number

        # A product of half-precision matrices may sum in float32 and leave the sums there,
        # but only on CUDA.
        self.native = x.is_cuda and x.dtype == rows.dtype != self.dtype
        self.rows = rows if self.native else rows.to(self.dtype)
        self.bias = given.bias.to(self.dtype)
        self.up = given.up
        if given.up is not None and not self.native:
            self.up = given.up.to(self.dtype)
        self.up_bias = None if given.up_bias is None else given.up_bias.to(self.dtype)

        self.at_hand = numbers_at_hand(x)
        self.take_factor(given.factor)
        epsilon = given.epsilon.to(self.dtype)
        self.least = epsilon.item() / self.inside if self.at_hand else epsilon

        norms_x = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.dtype)
        self.square_x = norms_x.square() / self.inside
        # From the weight at every call: a norm kept from earlier would be wrong after a step or
        # an adapter.
        square_rows = torch.linalg.vector_norm(rows, dim=-1, dtype=self.dtype).square()
        self.square_rows = (square_rows + epsilon) / self.inside

    def take_factor(self, factor: Tensor) -> None:
        """Read the scale or the temperature, (1,)."""
        raise NotImplementedError

    def compute_products(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x·w without b, and u·x if values are gated: (n, P) each, in new memory.

        With b, the rounding of the sum would remain in a small distance.
        """
        dots = self._multiply(x, self.rows, None)
        return dots, None if self.up is None else self._multiply(x, self.up, self.up_bias)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.native:
            product = torch.mm(x, weight.T, out_dtype=self.dtype)
            return product if bias is None else product.add_(bias)
        return nn.functional.linear(x.to(self.dtype), weight, bias)

    def denominator_and_score(self, here: slice, dots: Tensor) -> tuple[Tensor, Tensor]:
        """D and s of the tokens ``here`` with x·w = ``dots``; relu(s) if one-sided.

        D is less than ``least`` where rounding left it so.
        """
        score = dots + self.bias
        if self.one_sided:
            score.clamp_min_(0)
        squared_norms = torch.add(self.square_x[here], self.square_rows)
        return squared_norms.add_(dots, alpha=-2 / self.inside), score

    def cut(self, denominator: Tensor) -> Tensor | None:
        """Raise ``denominator`` to ``least``, in place.

        Returns:
            where it was no less before; None for everywhere.
        """
        apart = None
        if not (self.at_hand and denominator.amin() >= self.least):
            apart = denominator >= self.least
        denominator.clamp_min_(self.least)
        return apart

    def collect(
        self,
        here: slice,
        *,
        half_d_scores: Tensor,
        d_distances: Tensor,
        apart: Tensor | None,
        sums: BackwardSums,
    ) -> None:
        """Sum over the tokens ``here``, and turn ``half_d_scores`` into half the gradient of x·w.

        ``d_distances`` is −∂/∂D and is overwritten; ``apart`` comes from :meth:`cut`.
        """
        sums.scores += half_d_scores.sum(0)
        if apart is not None:
            sums.touching += d_distances.masked_fill(apart, 0).sum()
            d_distances.mul_(apart)
        half_d_scores.add_(d_distances, alpha=1 / self.inside)
        sums.per_token[here] = d_distances.sum(-1, keepdim=True)
        sums.per_row += d_distances.sum(0)

    def compute_coefficients(
        self, part: slice, dots: Tensor, ups: Tensor | None, out: Tensor
    ) -> Tensor:
        """Coefficients of the tokens ``part``, into ``out``, which may be ``dots`` itself."""
        raise NotImplementedError

    def finish(self, written: Tensor) -> None:
        """Turn the sum of all tokens into the output, in place."""

    def backward(
        self,
        part: slice,
        *,
        dots: Tensor,
        ups: Tensor | None,
        d_coefficients: Tensor,
        coefficients: Tensor,
        d_ups: Tensor | None,
        sums: BackwardSums,
    ) -> None:
        """The backward pass of the tokens ``part``, all matrices (n, P).

        Args:
            d_coefficients: on entry their gradient, on return half that of x·w.
            coefficients: filled with κ·u times the scale, or π·u.
            d_ups: filled with the gradient of u·x, if values are gated.
        """
        raise NotImplementedError

    def d_factor(self, sums: BackwardSums) -> Tensor:
        """The gradient of the scale or the temperature."""
        raise NotImplementedError


class ConicTerms(YatTerms):
    """scale · κ.

    On a CPU the scale goes inside, where it costs nothing: scale · κ = s · (s / D) with
    D = (‖x − w‖² + ε) / scale.
    """

    def take_factor(self, factor: Tensor) -> None:
        self.scale = factor.to(self.dtype)
        self.outside: Tensor | float = self.scale
        if self.at_hand:
            scale = self.scale.item()
            self.inside = min(max(scale, 1 / FAR), FAR)
            self.outside = scale / self.inside
        self.all_inside = self.at_hand and self.outside == 1

    def compute_coefficients(
        self, part: slice, dots: Tensor, ups: Tensor | None, out: Tensor
    ) -> Tensor:
        """scale · κ · u."""
        for here, rows in _blocks(dots, part):
            denominator, score = self.denominator_and_score(here, dots[rows])
            torch.div(score, denominator.clamp_min_(self.least), out=denominator)
            target = torch.mul(score, denominator, out=out[rows])
            if not self.all_inside:
                target.mul_(self.outside)
            if ups is not None:
                target.mul_(ups[rows])
        return out

    def backward(
        self,
        part: slice,
        *,
        dots: Tensor,
        ups: Tensor | None,
        d_coefficients: Tensor,
        coefficients: Tensor,
        d_ups: Tensor | None,
        sums: BackwardSums,
    ) -> None:
        for here, rows in _blocks(dots, part):
            gradient = d_coefficients[rows]
            denominator, score = self.denominator_and_score(here, dots[rows])
            apart = self.cut(denominator)
            ratio = torch.div(score, denominator, out=denominator)
            kernel = torch.mul(score, ratio, out=coefficients[rows])
            if not self.all_inside:
                kernel.mul_(self.outside)

            if ups is not None and d_ups is not None:
                torch.mul(gradient, kernel, out=d_ups[rows])
                gradient.mul_(ups[rows])
                kernel.mul_(ups[rows])
                sums.ups += d_ups[rows].sum(0)

            gradient.mul_(ratio)
            if not self.all_inside:
                gradient.mul_(self.outside)
            d_distances = torch.mul(gradient, ratio, out=ratio)
            self.collect(
                here, half_d_scores=gradient, d_distances=d_distances, apart=apart, sums=sums
            )

    def d_factor(self, sums: BackwardSums) -> Tensor:
        return sums.mean.sum() / self.scale  # the output is proportional to the scale


class ConvexTerms(YatTerms):
    """π = softmax(log κ / τ): κ^(1/τ) over the token's largest, then divided by its sum."""

    def __init__(self, given: MixtureArguments):
        super().__init__(given)
        self.mass = torch.empty_like(self.square_x)
        self.log_mass: Tensor = torch.empty_like(self.square_x)

    def take_factor(self, factor: Tensor) -> None:
        self.temperature = factor.item() if self.at_hand else factor.to(self.dtype)

    def compute_coefficients(
        self, part: slice, dots: Tensor, ups: Tensor | None, out: Tensor
    ) -> Tensor:
        """κ^(1/τ) · u relative to the largest κ^(1/τ)."""
        for here, rows in _blocks(dots, part):
            denominator, score = self.denominator_and_score(here, dots[rows])
            denominator.clamp_min_(self.least)
            target = torch.mul(score, score, out=out[rows])
            target.div_(denominator).log_().div_(self.temperature)

            best = target.amax(-1, keepdim=True)
            best = best.where(best != -torch.inf, torch.zeros_like(best))
            mass = target.sub_(best).exp_().sum(-1, keepdim=True)
            fires = mass > 0
            self.mass[here] = mass.where(fires, torch.ones_like(mass))
            self.log_mass[here] = (best + mass.log()).where(fires, torch.full_like(mass, torch.inf))

            if ups is not None:
                target.mul_(ups[rows])
        return out

    def finish(self, written: Tensor) -> None:
        written.div_(self.mass)

    def backward(
        self,
        part: slice,
        *,
        dots: Tensor,
        ups: Tensor | None,
        d_coefficients: Tensor,
        coefficients: Tensor,
        d_ups: Tensor | None,
        sums: BackwardSums,
    ) -> None:
        for here, rows in _blocks(dots, part):
            gradient = d_coefficients[rows]
            denominator, score = self.denominator_and_score(here, dots[rows])
            apart = self.cut(denominator)
            log_pi = torch.mul(score, score)
            log_pi.div_(denominator).log_().div_(self.temperature).sub_(sums.log_mass[here])
            pi = torch.exp(log_pi, out=coefficients[rows])

            if ups is not None and d_ups is not None:
                torch.mul(gradient, pi, out=d_ups[rows])
                gradient.mul_(ups[rows])
                sums.ups += d_ups[rows].sum(0)
            gradient.sub_(sums.mean[here]).mul_(pi)
            if ups is not None:
                pi.mul_(ups[rows])

            log_pi.clamp_min_(torch.finfo(self.dtype).min)
            sums.entropy += log_pi.mul_(gradient).sum()
            gradient.div_(self.temperature)
            d_distances = torch.div(gradient, denominator, out=denominator)
            gradient.div_(score.add_(score == 0))  # what does not fire has no gradient
            self.collect(
                here, half_d_scores=gradient, d_distances=d_distances, apart=apart, sums=sums
            )

    def d_factor(self, sums: BackwardSums) -> Tensor:
        return -sums.entropy / self.temperature


def _blocks(matrix: Tensor, part: slice) -> Iterator[tuple[slice, slice]]:
    """Runs of rows of ``matrix``, which are the tokens ``part``, that fit the cache of a CPU.

    Yields:
        the run as a slice of all tokens, and as one of the matrix; all rows at once on a device.
    """
    at_once = len(matrix)
    if matrix.device.type == "cpu":
        at_once = max(1, BLOCK // matrix.shape[1])
    for low in range(0, len(matrix), at_once or 1):
        high = min(low + at_once, len(matrix))
        yield slice(part.start + low, part.start + high), slice(low, high)
