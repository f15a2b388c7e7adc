"""Kernel readouts whose rows are tied to a unit's own: any number of kernels at the stock products.

Unit i of the teacher has a row g_i (its gate row, or its only one), in a gated FFN a second row
u_i, and an output v_i. Its P pieces are kernels at points of the plane of g_i and u_i:

    w_ip = α_ip g_i + β_ip u_i,    s_ip = w_ip·x + b_ip,    κ_ip = κ(s_ip, ‖x − w_ip‖²) ≥ 0
    y = Σ_i c_i v_i + b_out,       c_i = Σ_p a_ip κ_ip             (fixed values)
                                   c_i = Σ_p a_ip κ_ip (u_i·x)     (product)

Every score and distance follows from g_i·x, u_i·x, ‖x‖², ‖g_i‖², ‖u_i‖² and g_i·u_i. So there are
as many matrix products as in the stock FFN, whatever P is.

The kernel ``brownian`` needs no rows of pieces but a knot each: κ_ip = min(|g_i·x|, |knot|) on the
knot's side of zero, g_i·x with its bias. With values ``product``, u_i·x is clamped to ±far: each
piece is then a product of two Brownian covariances, between x and a point of the unit's plane at
which g_i·x is the knot and u_i·x is ±far. So it is positive definite too.

A sparse map keeps few units of a token whole, the loudest by |c_i|‖v_i‖, and nothing of the
others. With ``skip``, a linear map A x of the input is written beside the mixture.

The signs of the amounts a_ip and of u_i·x say whether a piece writes v_i or −v_i. Over the
dictionary of all v_i and all −v_i the coefficients are sums of kernels, or of products of kernels
with relu(±u_i·x), and nonnegative: the readout is conic.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .decode import RowNorms, sum_kept
from .errors import InputError
from .ffn import ACTIVATION_BYTES, KernelFFN
from .kept_knots import KeptKnots
from .kernels import Kernel, get_kernel
from .knot_blocks import BLOCKS
from .knots import KnotStep, mix_knot_coefficients, mix_knots
from .layer_config import LayerConfig
from .linears import get_effective_weight
from .parameters import fill_linear, to_at_least_float32
from .plan import Form, FusedKernels, choose_tied_form, reason_against_one_token
from .record import Readout
from .settings import PIECES
from .shards import get_local, is_split, sum_gradient
from .sparse_units import SparseUnits

CACHED_NUMBERS = 2**16
"""Scores that are worked on at once on a CPU: this many float32 numbers, several times over, fit
its cache."""
TENSORS_PER_PIECE = 8
"""Tensors of the size of the scores that the backward pass of one piece keeps."""


class Scores(NamedTuple):
    """What all pieces of a layer are made of, at its tokens; float32 at least."""

    first: Tensor
    """(..., units) g·x + bias."""
    second: Tensor | None
    """(..., units) u·x + bias; None in a plain FFN."""
    square: Tensor
    """(..., 1) ‖x‖²."""

    def split(self, tokens: int) -> Iterator[Scores]:
        """The same of so many tokens after the others."""
        firsts = self.first.flatten(0, -2).split(tokens)
        squares = self.square.flatten(0, -2).split(tokens)
        seconds: Sequence[Tensor | None] = [None] * len(firsts)
        if self.second is not None:
            seconds = self.second.flatten(0, -2).split(tokens)
        for first, second, square in zip(firsts, seconds, squares, strict=True):
            yield Scores(first, second, square)


class TiedKernelFFN(SparseUnits):
    """A readout with ``config.settings.pieces`` kernels per unit of the teacher, rows tied to the
    unit's own.

    Weights: ``input_prototypes`` (units, hidden_size) holds g with the teacher's bias;
    ``value_proj`` (units, hidden_size) u, in gated FFNs; ``output_prototypes`` (hidden_size, units)
    v, with b_out as its bias. ``pieces`` holds ``amount`` and ``alpha`` and ``shift``, and ``beta``
    where values are fixed in a gated FFN, or ``knot`` alone; (pieces, units) each. ``skip`` holds A
    (hidden_size, hidden_size), where there is one. ``log_ratio`` holds learned log-ratios to the
    layer's reference values.
    """

    def __init__(self, config: LayerConfig):
        super().__init__()
        settings = config.settings
        self.config = config
        self.kernel = get_kernel(settings.kernel)
        self.activation_bytes = ACTIVATION_BYTES
        self.fused: FusedKernels | None = None
        """Triton kernels that may serve this layer, put here by hf_kernel_ffn.gpu.fused.fuse()."""
        self.column_norms = RowNorms()
        """‖v_i‖² for calls without gradients, of which a sparse map needs the lengths."""
        self.kept_knots = KeptKnots()
        """What calls without gradients reuse while the weights are the same."""

        size = config.hidden_size
        units = config.prototypes
        self.input_prototypes = nn.Linear(size, units)
        self.output_prototypes = nn.Linear(units, size)
        if config.gated:
            self.value_proj = nn.Linear(size, units)

        names = name_piece_tensors(self.kernel, config)
        self._piece_count = settings.pieces or PIECES
        shape = (self._piece_count, units)
        self.pieces = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name in names})
        learned = [*self.kernel.parameters, "scale"]
        self.log_ratio = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in learned})
        if settings.simplex == "threshold":
            self.register_buffer("threshold_log_ratio", torch.zeros(1))
        if settings.skip:
            self.skip = nn.Linear(size, size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    @classmethod
    @torch.no_grad()
    def from_pieces(
        cls,
        config: LayerConfig,
        *,
        rows: Tensor,
        row_bias: Tensor | None,
        values: Tensor | None,
        value_bias: Tensor | None,
        outputs: Tensor,
        output_bias: Tensor | None,
        pieces: dict[str, Tensor],
    ) -> TiedKernelFFN:
        """A layer with these weights, in eval mode and without gradients.

        Args:
            rows, values: (units, hidden_size) g and u; ``values`` None in a plain FFN.
            outputs: (units, hidden_size) v.
            pieces: (pieces, units) each, by the names of the layer's ``pieces``.
        """
        with torch.device("meta"):  # drawing numbers that are replaced takes longer than the rest
            ffn = cls(config).eval().requires_grad_(False)
        ffn.to_empty(device=rows.device)
        # Copies: what is given may be the teacher's own weights.
        fill_linear(ffn.input_prototypes, rows.clone(), row_bias)
        fill_linear(ffn.output_prototypes, outputs.T.clone(), output_bias)
        if values is not None:
            fill_linear(ffn.value_proj, values.clone(), value_bias)
        for name, parameter in ffn.pieces.items():
            parameter.copy_(pieces[name])
        for parameter in ffn.log_ratio.values():
            parameter.zero_()
        if config.settings.simplex == "threshold":
            ffn.threshold_log_ratio.zero_()
        if config.settings.skip:
            ffn.skip.weight.zero_()
        return ffn

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to (..., hidden_size), in the dtype of the input."""
        form = choose_tied_form(self, hidden_states).form
        step: KnotStep | None = None
        if form is Form.FUSED and self.fused is not None:
            step = self.fused.knot_step()
        elif form is Form.ONE_PASS:
            step = BLOCKS

        if step is None:
            coefficients = self.coefficients(hidden_states).to(hidden_states.dtype)
            output = self._read_out(coefficients, hidden_states)
        elif self.config.settings.sparse:
            every = mix_knot_coefficients(self, hidden_states, step)
            output = self._read_out(self.keep_loudest(every), hidden_states)
        else:
            output = mix_knots(self, hidden_states, step)
        if self.config.settings.skip:
            output = output + self.skip(hidden_states)
        return self.dropout(output) if self.training else output

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as nn.Module does; what was kept for evaluation is dropped."""
        self.kept_knots.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to()`` and its like call: what was kept is of the old device and dtype."""
        self.kept_knots.forget()
        return super()._apply(fn, recurse)

    def _read_out(self, coefficients: Tensor, hidden_states: Tensor) -> Tensor:
        """The mixture (..., hidden_size) by its ``coefficients`` (..., units) at the input."""
        if reason_against_one_token(self, hidden_states) is None:
            return sum_kept(self.output_prototypes, coefficients)
        hidden_dropout = self.config.hidden_dropout
        kept = nn.functional.dropout(coefficients, hidden_dropout, self.training)
        return self.output_prototypes(kept)

    def coefficients(self, hidden_states: Tensor) -> Tensor:
        """c (..., units), float32 at least, of either sign: what multiplies
        ``output_prototypes``; zero where a sparse map does not keep a unit."""
        return self.keep_loudest(self.coefficients_of_all(hidden_states))

    def coefficients_of_all(self, hidden_states: Tensor) -> Tensor:
        """c (..., units), float32 at least, whatever a sparse map keeps."""
        return self.mix_scores(self.score(hidden_states))

    def mix_scores(self, scores: Scores) -> Tensor:
        """c (..., units), float32 at least, of what the layer's rows say of its inputs: of all
        units, whatever a sparse map keeps."""
        total = self._sum_pieces(scores, self.get_piece_tensor("amount"))
        factor = self._factor(scores)
        return total if factor is None else total * factor

    def readout(self, hidden_states: Tensor) -> Readout:
        """The record at ``hidden_states`` (..., hidden_size), over all v_i and then all −v_i.

        Raises:
            InputError: units are spread over processes.
        """
        self.require_whole("is to be read")
        plus, minus = self._signed_coefficients(self.score(hidden_states))
        coefficients = torch.cat([plus, minus], -1)
        intensity = coefficients.sum(-1, keepdim=True)
        shares = coefficients / intensity.where(intensity > 0, torch.ones_like(intensity))
        weight, bias = get_effective_weight(self.output_prototypes, hidden_states)
        units = range(self.config.prototypes)
        return Readout(
            coefficients=coefficients.to(hidden_states.dtype),
            dictionary=torch.cat([weight.T, -weight.T]),
            bias=bias,
            shares=shares,
            intensity=intensity.squeeze(-1),
            names=(*(f"{unit}+" for unit in units), *(f"{unit}-" for unit in units)),
            skip=self.skip(hidden_states) if self.config.settings.skip else None,
        )

    def _signed_coefficients(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """What multiplies v_i and what multiplies −v_i, (..., units) each, both nonnegative.

        A unit that a sparse map keeps is one kernel, of all its pieces: it writes one of the two.
        """
        if self.config.settings.sparse:
            kept = self.keep_loudest(self.mix_scores(scores))
            return kept.clamp_min(0), (-kept).clamp_min(0)

        amount = self.get_piece_tensor("amount")
        writes = self._sum_pieces(scores, amount.clamp_min(0))
        writes_against = self._sum_pieces(scores, (-amount).clamp_min(0))
        factor = self._factor(scores)
        if factor is None:
            return writes, writes_against
        along = factor.clamp_min(0)
        against = (-factor).clamp_min(0)
        plus = writes * along + writes_against * against
        minus = writes * against + writes_against * along
        return plus, minus

    def require_whole(self, purpose: str) -> None:
        """InputError where this process has only some of the units."""
        if self._units_are_split():
            raise InputError(
                f"found a readout whose units are spread over processes and that {purpose}, "
                "expected all units in one: load the model without tensor parallelism"
            )

    def get_piece_tensor(self, name: str) -> Tensor:
        """(pieces, units) one of ``pieces``, float32 at least; of this process's units, where
        units are spread over processes."""
        return to_at_least_float32(self.get_stored_piece_tensor(name))

    def get_stored_piece_tensor(self, name: str) -> Tensor:
        """The same, in the dtype that it is stored in."""
        tensor = self.pieces[name]
        return get_local(tensor) if self._units_are_split() else tensor

    def _units_are_split(self) -> bool:
        """Whether this process has some of the units, by tensor parallelism."""
        return is_split(self.input_prototypes)

    def get_log_ratio(self, name: str) -> Tensor:
        """A learned log-ratio; its gradient is the sum over the processes that have units."""
        log_ratio = super().get_log_ratio(name)
        if self._units_are_split():
            return sum_gradient(log_ratio, self.input_prototypes.weight)
        return log_ratio

    @property
    def multiplies_by_up(self) -> bool:
        """Whether values are a product: kernels times u·x."""
        return self.config.gated and self.config.settings.values == "product"

    def _factor(self, scores: Scores) -> Tensor | None:
        """(..., units) what kernels are multiplied by where values are a product: u·x, clamped to
        ±far where the kernel has knots."""
        if not self.multiplies_by_up or scores.second is None:
            return None
        if not self.kernel.uses_knot:
            return scores.second
        far = self.config.reference["far"]
        return scores.second.clamp(-far, far)

    def score(self, hidden_states: Tensor) -> Scores:
        """What all pieces are made of, at ``hidden_states`` (..., hidden_size)."""
        gate = to_at_least_float32(self.input_prototypes(hidden_states))
        up = None
        if self.config.gated:
            up = to_at_least_float32(self.value_proj(hidden_states))
        square = to_at_least_float32(hidden_states).square().sum(-1, keepdim=True)
        if self._units_are_split():
            square = sum_gradient(square, self.input_prototypes.weight)
        return Scores(gate, up, square)

    def _sum_pieces(self, scores: Scores, amount: Tensor) -> Tensor:
        """scale · Σ_p ``amount`` κ_p, (..., units)."""
        first = scores.first
        numbers = self._piece_numbers(first, amount * self.positive("scale"))
        if torch.compiler.is_compiling():
            return self._sum_block(scores, numbers)

        needs_gradient = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (*scores, *numbers.values())
        )
        block = self._tokens_at_once(first, needs_gradient)
        if block >= first[..., 0].numel():
            return self._sum_block(scores, numbers)

        sums = []
        for tokens in scores.split(block):
            if needs_gradient:  # the pieces of a block are computed again in its backward pass
                sums.append(checkpoint(self._sum_block, tokens, numbers, use_reentrant=False))
            else:
                sums.append(self._sum_block(tokens, numbers))
        return torch.cat(sums).view(first.shape)

    def _tokens_at_once(self, first: Tensor, needs_gradient: bool) -> int:
        units = max(1, first.shape[-1])
        if needs_gradient:
            per_token = TENSORS_PER_PIECE * self._piece_count * units * first.itemsize
            return max(1, self.activation_bytes // per_token)
        if first.device.type == "cpu":
            return max(1, CACHED_NUMBERS // units)
        return max(1, self.activation_bytes // (TENSORS_PER_PIECE * units * first.itemsize))

    def _piece_numbers(self, like: Tensor, amount: Tensor) -> dict[str, Tensor]:
        """Of every piece (pieces, units): α, β, b, the amount; with a distance the bias of s and
        ‖w‖²."""
        numbers = {
            name: self.get_piece_tensor(name).to(like.dtype)
            for name in self.pieces
            if name != "amount"
        }
        numbers["amount"] = amount
        if not self.kernel.uses_distance:
            return numbers

        example = self.input_prototypes.weight.new_empty(1, self.config.hidden_size)
        rows, bias = get_effective_weight(self.input_prototypes, example)
        rows = rows.to(like.dtype)
        alpha = numbers["alpha"]
        numbers["norm2"] = alpha.square() * rows.square().sum(-1)
        numbers["bias"] = numbers["shift"] + (0 if bias is None else alpha * bias)
        if "beta" in numbers:
            beta = numbers["beta"]
            values, value_bias = get_effective_weight(self.value_proj, example)
            values = values.to(like.dtype)
            between = (rows * values).sum(-1)
            numbers["norm2"] = numbers["norm2"] + beta.square() * values.square().sum(-1)
            numbers["norm2"] = numbers["norm2"] + 2 * alpha * beta * between
            numbers["bias"] = numbers["bias"] + (0 if value_bias is None else beta * value_bias)
        return numbers

    def _sum_block(self, scores: Scores, numbers: dict[str, Tensor]) -> Tensor:
        """Σ_p a_p κ_p of the tokens of one block, (tokens, units)."""
        parameters = self.kernel_parameters()
        total = torch.zeros_like(scores.first)
        for piece in range(self._piece_count):
            if self.kernel.uses_knot:
                knot = numbers["knot"][piece]
                kernel = self.kernel.value(scores.first, None, knot=knot, **parameters)
                total = torch.addcmul(total, kernel, numbers["amount"][piece])
                continue
            score = torch.addcmul(numbers["shift"][piece], scores.first, numbers["alpha"][piece])
            if "beta" in numbers and scores.second is not None:
                score = torch.addcmul(score, scores.second, numbers["beta"][piece])
            distance2 = None
            if self.kernel.uses_distance:
                without_bias = score - numbers["bias"][piece]
                norms = scores.square + numbers["norm2"][piece]
                distance2 = torch.add(norms, without_bias, alpha=-2).clamp_min(0)
            kernel = self.kernel.value(score, distance2, **parameters)
            total = torch.addcmul(total, kernel, numbers["amount"][piece])
        return total


def name_piece_tensors(kernel: Kernel, config: LayerConfig) -> list[str]:
    """The names of the numbers that every piece of a layer has."""
    if kernel.uses_knot:
        return ["knot", "amount"]
    in_plane = config.gated and config.settings.values == "fixed"
    return ["alpha", "shift", "amount", *(["beta"] if in_plane else [])]


AnyKernelFFN = KernelFFN | TiedKernelFFN
"""What a converted FFN may be."""


def make_ffn(config: LayerConfig) -> AnyKernelFFN:
    """The module that ``config`` describes, with random weights."""
    return TiedKernelFFN(config) if config.settings.rows == "tied" else KernelFFN(config)
