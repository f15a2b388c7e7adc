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

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from .decode import RowNorms, sum_kept
from .ffn import ACTIVATION_BYTES, KernelFFN
from .kept_knots import KeptKnots
from .kernels import get_kernel
from .knot_blocks import BLOCKS
from .knot_readout import mix_knot_coefficients, mix_knots
from .knots import KnotStep
from .layer_config import LayerConfig
from .linears import get_effective_weight
from .parameters import fill_linear
from .plan import Form, FusedKernels, choose_tied_form, reason_against_one_token
from .record import Readout
from .settings import PIECES
from .sparse_units import SparseUnits
from .unit_pieces import Scores, name_piece_tensors


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
        writes = self.sum_pieces(scores, amount.clamp_min(0))
        writes_against = self.sum_pieces(scores, (-amount).clamp_min(0))
        factor = self.compute_factor(scores)
        if factor is None:
            return writes, writes_against
        along = factor.clamp_min(0)
        against = (-factor).clamp_min(0)
        plus = writes * along + writes_against * against
        minus = writes * against + writes_against * along
        return plus, minus


AnyKernelFFN = KernelFFN | TiedKernelFFN
"""What a converted FFN may be."""


def make_ffn(config: LayerConfig) -> AnyKernelFFN:
    """The module that ``config`` describes, with random weights."""
    return TiedKernelFFN(config) if config.settings.rows == "tied" else KernelFFN(config)
