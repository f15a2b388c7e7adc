"""Dense Yat readouts on a GPU: Triton kernels (fused_kernels.py) around plain matrix products; and a sum over few output prototypes.

    forward   c = κ·scale·u, or κ^(1/τ)·u and its row mass, in the epilogue of x·w;   then y = c·Vᵀ (divided by the mass)
    backward  dc = dy·V;   c, ds, du and all sums in the epilogue of x·w, computed again;   then dx = ds·W, dW = dsᵀ·x, dV = dyᵀ·c

The conic readout is the function of one_pass.py, the convex one softmax(log κ / τ): κ^(1/τ) is written relative to the power of
two above its tile's largest, so that it neither over- nor underflows, and a row's tiles are brought to one such power afterwards,
exactly. No (tokens, prototypes) matrix is held in more than the working dtype. Checked by Triton's interpreter and compiler, not
run or measured on a GPU.
It stays in the package, and off until :func:`fuse` is called, or trial.py lets it in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library

from ..checkpoint_code.compat import are_function_transforms_active
from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.linears import lay_out_by_prototypes
from ..checkpoint_code.one_pass import mix_dense_yat
from ..checkpoint_code.operators import (
    ARGUMENTS,
    TENSORS,
    chunks,
    differentiate,
    empty_gradients,
    namespace,
)
from ..checkpoint_code.plan import (
    linears_of,
    reason_against_dense_yat,
    reason_against_plain_weights,
)
from .triton_kernels import INTERPRETED, backward_tuned, forward_tuned, gather_kernel, triton

TOKENS, PROTOTYPES = 128, 128
"""Largest tile of scores; with half the tokens where a longer epilogue needs the registers. A tile always has that many prototypes:
row masses are kept per tile."""
FEW = 8
"""Tokens up to which a sparse readout without gradients gathers the active output prototypes."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMESPACE = namespace(__name__)


def fused_mixture(
    x, rows, bias, dictionary, epsilon, factor, up, up_bias, one_sided, mix, limit, convex=False
):
    """The function :func:`hf_kernel_ffn.checkpoint_code.operators.plain`, arguments as there, in any strides and float32, bfloat16 or float16;
    ``limit``: bytes that the (tokens, prototypes) matrices may take together: more tokens go through in chunks. Differentiable."""
    return _mixture(
        x, rows, bias, dictionary, epsilon, factor, up, up_bias, one_sided, mix, limit, convex
    )[0]


@library.custom_op(
    f"{NAMESPACE}::mixture",
    mutates_args=(),
    schema=f"({ARGUMENTS}) -> (Tensor written, Tensor log_mass)",
)
def _mixture(
    x, rows, bias, dictionary, epsilon, factor, up, up_bias, one_sided, mix, limit, convex
):
    """The mixture, and if convex log₂ Σ κ^(1/τ) (N,) float32, +∞ where nothing fires."""
    tiles = -(-len(rows) // PROTOTYPES)
    width = tiles * PROTOTYPES
    written = x.new_empty(len(x), dictionary.shape[0], dtype=mix)
    log_mass = x.new_empty(len(x) if convex else 0, dtype=torch.float32)
    block = TOKENS if up is None and not convex else TOKENS // 2
    given = _Given(x, rows, bias, epsilon, factor, up, up_bias, one_sided, convex, block)
    mixed = dictionary.to(mix)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        for part in chunks(len(x), limit, width * mix.itemsize):
            count = len(range(*part.indices(len(x))))
            coefficients = x.new_empty(count, width, dtype=mix)
            top, mass = (
                x.new_empty(count if convex else 1, tiles, dtype=torch.float32) for _ in range(2)
            )
            given.launch(
                forward_tuned,
                part,
                coefficients=coefficients,
                tops=top,
                masses=mass,
                tiles=tiles,
                width=width,
            )
            if not convex:
                torch.mm(coefficients[:, : len(rows)], mixed.T, out=written[part])
                continue
            highest = top.amax(1, keepdim=True)
            fires = highest > -torch.inf
            share = torch.exp2(top - highest.where(fires, torch.zeros_like(highest)))
            mass = (mass * share).sum(1, keepdim=True)
            coefficients.view(count, tiles, PROTOTYPES).mul_(share[:, :, None])  # powers of two
            total = mass.where(fires, torch.ones_like(mass))
            written[part] = _product(coefficients[:, : len(rows)], mixed.T) / total
            log_mass[part] = (highest + total.log2()).where(
                fires, torch.full_like(total, torch.inf)
            )[:, 0]
    return written, log_mass


@_mixture.register_fake
def _(x, rows, bias, dictionary, epsilon, factor, up, up_bias, one_sided, mix, limit, convex):
    log_mass = x.new_empty(x.shape[0] if convex else 0, dtype=torch.float32)
    return x.new_empty(x.shape[0], dictionary.shape[0], dtype=mix), log_mass


@library.custom_op(
    f"{NAMESPACE}::mixture_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor written, Tensor log_mass, bool[] wanted, {ARGUMENTS}) -> ({', '.join(['Tensor'] * TENSORS)})",
)
def _mixture_backward(
    gradient,
    written,
    log_mass,
    wanted,
    x,
    rows,
    bias,
    dictionary,
    epsilon,
    factor,
    up,
    up_bias,
    one_sided,
    mix,
    limit,
    convex,
):
    """Gradients of the eight tensors among the arguments, empty where not wanted."""
    given = _Given(x, rows, bias, epsilon, factor, up, up_bias, one_sided, convex, TOKENS // 2)
    dtype, prototypes, tiles = given.x.dtype, len(rows), -(-len(rows) // PROTOTYPES)
    new = x.new_empty
    d_x = new(x.shape if wanted[0] else 0, dtype=x.dtype)
    found: dict = {}  # sums over chunks, float32

    def add(name, part):
        found[name] = found[name].add_(part) if name in found else part

    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        unit_x, unit_rows = _unit(given.square_x, dtype), _unit(given.square_rows, dtype)
        unit_up = None if up is None else _unit(_square(up), dtype)
        scaled_x, scaled_rows = _over(given.x, unit_x), _over(given.rows, unit_rows)
        scaled_up = None if up is None else _over(given.up, unit_up)
        gradient, mixed = gradient.to(mix), dictionary.to(mix)
        mean = (gradient.float() * written.float()).sum(-1) if convex else log_mass
        for part in chunks(len(x), limit, 4 * prototypes * max(mix.itemsize, dtype.itemsize)):
            count = len(range(*part.indices(len(x))))
            d_scores = new(count, prototypes, dtype=dtype)
            d_ups = d_scores if up is None else torch.empty_like(d_scores)
            coefficients = new(count, prototypes, dtype=mix)
            down = -(-count // given.block(count))
            per_token = new(count, tiles, dtype=torch.float32)
            per_row, scores, ups = (new(down, prototypes, dtype=torch.float32) for _ in range(3))
            d_epsilon, d_factor = (new(down * tiles, dtype=torch.float32) for _ in range(2))
            given.launch(
                backward_tuned, part, shift=log_mass[part] if convex else log_mass, mean=mean[part] if convex else mean,
                unit_x=unit_x[part], unit_rows=unit_rows, unit_up=unit_rows if up is None else unit_up,
                gradient=gradient[part] @ mixed, coefficients=coefficients, d_scores=d_scores, d_ups=d_ups, per_token=per_token,
                per_row=per_row, sum_scores=scores, sum_ups=ups, sum_epsilon=d_epsilon, sum_factor=d_factor, tiles=tiles,
            )  # fmt: skip
            add("bias", scores.sum(0))
            add("rows' distance", per_row.sum(0))
            add("epsilon", -d_epsilon.sum().reshape(1))
            add("factor", d_factor.sum().reshape(1))
            if wanted[3]:
                add("dictionary", _product(gradient[part].T, coefficients))
            if wanted[1]:
                add("rows", _product(d_scores.T, scaled_x[part]))
            if up is not None:
                add("up_bias", ups.sum(0))
                if wanted[6]:
                    add("up", _product(d_ups.T, scaled_x[part]))
            if wanted[0]:
                back = _product(d_scores, scaled_rows)
                if up is not None:
                    back += _product(d_ups, scaled_up)
                if dtype == torch.float16:
                    back /= unit_x[part, None]
                d_x[part] = back.addcmul_(
                    given.x[part].float(), per_token.sum(1, keepdim=True), value=-2
                )
        if dtype == torch.float16 and found:
            for name, unit in (("rows", unit_rows), ("up", unit_up)):
                if name in found:
                    found[name] /= unit[:, None]
        if "rows" in found:
            found["rows"].addcmul_(given.rows.float(), found["rows' distance"][:, None], value=-2)
    names = ("rows", "bias", "dictionary", "epsilon", "factor", "up", "up_bias")
    rest = []
    for name, like, asked in zip(
        names, (rows, bias, dictionary, epsilon, factor, up, up_bias), wanted[1:]
    ):
        if not asked or like is None:
            rest.append(new(0))
        else:  # no token, no gradient
            rest.append(found[name].to(like.dtype) if name in found else torch.zeros_like(like))
    return d_x, *rest


@_mixture_backward.register_fake
def _(gradient, written, log_mass, wanted, x, *rest):
    return empty_gradients(x, (x, *rest[: TENSORS - 1]), wanted)


differentiate(_mixture, _mixture_backward)


class _Given:
    """What both kernels read, in the dtype that scores are multiplied in; ``most`` tokens in a tile."""

    def __init__(self, x, rows, bias, epsilon, factor, up, up_bias, one_sided, convex, most):
        dtype = (
            x.dtype
            if x.dtype == rows.dtype
            else torch.promote_types(torch.promote_types(x.dtype, rows.dtype), torch.float32)
        )
        self.x, self.rows, self.up = (
            None if t is None else _within_reach(t.to(dtype)) for t in (x, rows, up)
        )
        self.bias, self.up_bias = (
            bias.contiguous(),
            None if up_bias is None else up_bias.contiguous(),
        )
        self.epsilon, self.factor, self.most = epsilon.float(), factor.float(), most
        # From the weight in use at every call: a norm kept from earlier would be wrong after a step or an adapter.
        self.square_x, self.square_rows = _square(x), _square(rows)
        tf32 = x.is_cuda and torch.backends.cuda.matmul.allow_tf32
        self.flags = dict(
            GATED=up is not None, BIASED=up_bias is not None, ONE_SIDED=one_sided, CONVEX=convex,
            PRECISION="tf32" if tf32 else "ieee", BLOCK_PROTOTYPES=PROTOTYPES,
        )  # fmt: skip

    def block(self, tokens):
        """Tokens in a tile, of ``tokens``."""
        return min(self.most, max(16, 1 << (tokens - 1).bit_length()))

    def launch(self, kernel, part, **own):
        """Run ``kernel`` over all tiles of the tokens ``part``."""
        x, up = self.x[part], self.rows if self.up is None else self.up
        block = self.block(len(x))
        kernel[(-(-len(x) // block) * -(-len(self.rows) // PROTOTYPES),)](
            x=x, rows=self.rows, up=up, bias=self.bias, up_bias=self.bias if self.up_bias is None else self.up_bias,
            square_x=self.square_x[part], square_rows=self.square_rows, epsilon=self.epsilon, factor=self.factor,
            tokens=len(x), prototypes=len(self.rows), SIZE=x.shape[1], x_token=x.stride(0), x_feature=x.stride(1),
            row=self.rows.stride(0), row_feature=self.rows.stride(1), up_row=up.stride(0), up_feature=up.stride(1),
            BLOCK_TOKENS=block, **self.flags, **own,
        )  # fmt: skip


def _within_reach(matrix):
    """``matrix``, or a copy where 32 bits would not hold the offsets within a tile."""
    return matrix if max(matrix.stride()) < 2**23 else matrix.contiguous()


def _square(matrix):
    return torch.linalg.vector_norm(matrix, dim=-1, dtype=torch.float32).square()


def _unit(square, dtype):
    """A power of two about the length of each row if ``dtype`` is float16, otherwise 1: gradients of scores vary inversely with the
    lengths of both their vectors, and float16 holds them only times these."""
    length = square.sqrt() if dtype == torch.float16 else torch.zeros_like(square)
    return torch.ldexp(torch.ones_like(length), torch.frexp(length).exponent)


def _over(matrix, unit):
    """Rows over their units, in the dtype of ``matrix``, contiguous as products like them."""
    return (matrix / unit[:, None]).to(matrix.dtype) if matrix.dtype == torch.float16 else matrix


def _product(left, right):
    """left @ right, summed and left in float32; of half-precision matrices as such on CUDA, the only place to have that."""
    if left.dtype == torch.float32:
        return left @ right
    return (
        torch.mm(left, right, out_dtype=torch.float32)
        if left.is_cuda
        else left.float() @ right.float()
    )


def active(coefficients):
    """Indices (T, P) int64 of the coefficients (T, P) that are not zero, in order, and how many (T,); past those, −1. The device is
    not waited for."""
    place = (coefficients != 0).cumsum(-1)
    slots = place.where(coefficients != 0, torch.zeros_like(place))  # 0: for all that are zero
    indices = torch.full(
        (len(place), place.shape[1] + 1), -1, dtype=torch.int64, device=place.device
    )
    numbers = torch.arange(place.shape[1], device=place.device).expand_as(place)
    return indices.scatter(1, slots, numbers)[:, 1:], place[:, -1]


@library.custom_op(
    f"{NAMESPACE}::gather",
    mutates_args=(),
    schema="(Tensor coefficients, Tensor indices, Tensor counts, Tensor dictionary) -> Tensor",
)
def gather(coefficients, indices, counts, dictionary):
    """``Σ_{j < counts} coefficients_j · v_{indices_j}``, summed in float32: (T, d) in the dtype of ``coefficients``. No gradients.

    ``coefficients`` and ``indices`` (T, slots), ``counts`` (T,) integers; dictionary (d, P) of any strides, columns v_i: quickest where
    the numbers of a column lie side by side. Slots with a coefficient 0 or an index outside of 0 … P − 1 are skipped unread.
    """
    size, prototypes = dictionary.shape
    written = coefficients.new_empty(len(coefficients), size)
    with torch.cuda.device_of(coefficients):
        if written.numel():
            gather_kernel[(len(coefficients), -(-size // 128))](
                coefficients.contiguous(), indices.contiguous(), counts.contiguous(), dictionary, written, indices.shape[1],
                prototypes, size, dictionary.stride(0), dictionary.stride(1), BLOCK_SLOTS=32, BLOCK_FEATURES=128, num_warps=4,
            )  # fmt: skip
    return written


@gather.register_fake
def _(coefficients, indices, counts, dictionary):
    return coefficients.new_empty(coefficients.shape[0], dictionary.shape[0])


@dataclass(frozen=True)
class Fused:
    """What a KernelFFN asks first when it is in ``ffn.fused``."""

    required: bool = False
    """Whether a call that the Triton kernels cannot serve is an error; otherwise the layer goes on without them."""

    def reason_against_readout(self, ffn: KernelFFN, hidden_states: Tensor) -> str | None:
        """Why they do not compute the output of ``ffn`` at ``hidden_states``; None if they do.

        Raises:
            InputError: ``required``, and neither this nor, for a sparse layer, the gather can serve the call.
        """
        if not (self.required or hidden_states.is_cuda):
            return "a tensor off the GPU, expected one on it"
        reason = reason_against_fused_readout(ffn, hidden_states)
        if reason and self.required and reason_against_fused_gather(ffn, hidden_states):
            raise InputError(
                f"found {reason}: call it so, or fuse without required, which steps aside"
            )
        return reason

    def reason_against_sum(self, ffn: KernelFFN, hidden_states: Tensor) -> str | None:
        """Why they do not sum the output prototypes of ``ffn``; None if they do, of few tokens the active ones alone."""
        if not (self.required or hidden_states.is_cuda):
            return "a tensor off the GPU, expected one on it"
        return reason_against_fused_gather(ffn, hidden_states)

    def readout(self, ffn: KernelFFN, hidden_states: Tensor) -> Tensor:
        """The output (..., d) of ``ffn`` before dropout, where nothing is against it."""
        return fused_readout(ffn, hidden_states)

    def mixture(self, ffn: KernelFFN, coefficients: Tensor) -> Tensor:
        """Σ c_i v_i + b_out (..., d) of few tokens by the active output prototypes alone, where nothing is against it."""
        linear = ffn.output_prototypes
        if not (torch.compiler.is_compiling() or linear.weight.T.is_contiguous() or ffn.training):
            lay_out_by_prototypes(linear)
        return gathered(ffn, coefficients) + linear.bias


def fuse(model: Any, required: bool = False) -> None:
    """Let every kernel readout of ``model`` run by the Triton kernels of this file where they can serve a call; ``required``: raise
    InputError in a call that they cannot. ``ffn.fused = None`` forbids it again. Nothing of it is saved."""
    for ffn in model.kernel_ffns().values():
        ffn.fused = Fused(required)


def fused_readout(ffn: KernelFFN, hidden_states: Tensor) -> Tensor:
    """The output (..., d) of ``ffn`` before dropout, where nothing is against it."""
    return mix_dense_yat(ffn, hidden_states, fused_mixture)


def gathered(ffn, coefficients):
    """Σ c_i v_i (..., d), without the output bias, where nothing is against it."""
    flat = coefficients.reshape(-1, coefficients.shape[-1])
    indices, counts = active(flat)
    written = gather(
        flat.gather(1, indices.clamp_min(0)), indices, counts, ffn.output_prototypes.weight
    )
    return written.unflatten(0, coefficients.shape[:-1])


def reason_against_fused_readout(ffn: KernelFFN, x: Tensor) -> str | None:
    """Why ``ffn`` cannot be fused at ``x``: what was found and what is expected; None if it can."""
    simplex = ffn.config.settings.simplex
    if simplex != "softmax":
        return f"simplex {simplex!r} with {_tokens(x)} tokens, expected 'softmax', or up to {FEW} tokens without gradients"
    reason = reason_against_dense_yat(ffn)
    if reason is not None:
        return f"{reason} for the fused readout"
    return _against(x, linears_of(ffn))


def reason_against_fused_gather(ffn: KernelFFN, x: Tensor) -> str | None:
    """Why few tokens of ``ffn`` cannot be summed from the active output prototypes alone; None if they can."""
    if (
        ffn.config.settings.simplex == "softmax"
        or torch.is_grad_enabled()
        or not 0 < _tokens(x) <= FEW
    ):
        return "another call"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast"
    if are_function_transforms_active():
        return "a transform of torch.func, expected none"
    reason = reason_against_plain_weights([ffn.output_prototypes])
    return reason or _against(x, [ffn.output_prototypes])


def _against(x, linears) -> str | None:
    if triton is None:
        return "no Triton, expected triton 3.6 or newer (pip install triton) for the fused readout"
    if not _runs(x.device.type, x.device.index):
        return f"device {x.device}, expected a CUDA GPU of compute capability 8.0 or newer for the fused readout"
    dtypes = {x.dtype, *(linear.weight.dtype for linear in linears)}
    if not dtypes <= set(DTYPES) or (
        len(dtypes) > 1 and not torch.is_autocast_enabled(x.device.type)
    ):
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"{names}, expected one of float32, bfloat16 and float16, for input and weights alike, for the fused readout"
    return None


@torch.compiler.assume_constant_result
def _runs(device, index) -> bool:
    if device == "cuda":
        return torch.cuda.get_device_capability(index) >= (8, 0)
    return device == "cpu" and INTERPRETED


def _tokens(x):
    return x.numel() // x.shape[-1]
