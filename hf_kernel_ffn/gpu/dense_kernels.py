"""The Triton kernels of dense mixtures: tiles of x·w with all that follows in their epilogue.

The formulas stand in dense_mixture.py. Matrices are read at any strides; offsets are 64 bits wide
up to a tile and 32 bits within; everything is summed in float32; what lies outside a matrix is
zero.
"""

from __future__ import annotations

from typing import Any

from .optional_triton import INTERPRETED, jit, tl, triton

SHAPES = ((64, 8, 3), (64, 8, 4), (64, 4, 3), (32, 4, 4), (32, 8, 3), (16, 8, 3))
"""Features read at once, warps and pipeline stages that are tried once per size of a layer and of
its tiles."""

SMALL_TILE = 32
"""Tokens of a tile that four warps have registers for."""


@jit
def _place(tokens, prototypes, BLOCK_TOKENS: tl.constexpr, BLOCK_PROTOTYPES: tl.constexpr):
    """Which tile of tokens and which of prototypes this program has; programs that run together
    have tiles of the same few, and share what they read."""
    down = tl.cdiv(tokens, BLOCK_TOKENS)
    across = tl.cdiv(prototypes, BLOCK_PROTOTYPES)
    group = tl.program_id(0) // (8 * across)
    within = tl.program_id(0) % (8 * across)
    height = tl.minimum(down - 8 * group, 8)
    return 8 * group + within % height, within // height


@jit
def _products(
    x,
    rows,
    up,
    down,
    across,
    tokens,
    prototypes,
    x_token,
    x_feature,
    row,
    row_feature,
    up_row,
    up_feature,
    SIZE: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """x·w and, if values are gated, x·u of one tile (BLOCK_TOKENS, BLOCK_PROTOTYPES), float32;
    zero outside the matrix."""
    first = tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, BLOCK_PROTOTYPES)
    feature = tl.arange(0, BLOCK_FEATURES)
    x += down.to(tl.int64) * BLOCK_TOKENS * x_token
    rows += across.to(tl.int64) * BLOCK_PROTOTYPES * row
    up += across.to(tl.int64) * BLOCK_PROTOTYPES * up_row
    xs = first[:, None] * x_token + feature[None, :] * x_feature
    ws = column[None, :] * row + feature[:, None] * row_feature
    us = column[None, :] * up_row + feature[:, None] * up_feature
    here = (first < tokens - down * BLOCK_TOKENS)[:, None]
    there = (column < prototypes - across * BLOCK_PROTOTYPES)[None, :]
    step = tl.full((), BLOCK_FEATURES, tl.int64)
    dot = tl.zeros((BLOCK_TOKENS, BLOCK_PROTOTYPES), tl.float32)
    ups = dot
    for start in range(0, SIZE, BLOCK_FEATURES):
        inside = feature < SIZE - start
        part = tl.load(x + xs, mask=here & inside[None, :], other=0.0)
        dot = tl.dot(
            part,
            tl.load(rows + ws, mask=there & inside[:, None], other=0.0),
            dot,
            input_precision=PRECISION,
        )
        if GATED:
            ups = tl.dot(
                part,
                tl.load(up + us, mask=there & inside[:, None], other=0.0),
                ups,
                input_precision=PRECISION,
            )
        x += step * x_feature
        rows += step * row_feature
        up += step * up_feature
    return dot, ups


@jit
def _terms(dot, bias, square_x, square_rows, epsilon, ONE_SIDED: tl.constexpr):
    """s, ‖x − w‖² as rounding left it, and ‖x − w‖² + ε; a NaN stays one."""
    score = dot + bias[None, :]
    if ONE_SIDED:
        score = tl.where(score < 0, 0.0, score)
    distance = square_x[:, None] + square_rows[None, :] - 2 * dot
    return score, distance, tl.where(distance < 0, 0.0, distance) + epsilon


@jit
def _log2(score, denominator, temperature):
    """log₂ κ / τ, −∞ where nothing fires."""
    fires = score != 0
    size = tl.where(fires, tl.abs(score), 1.0)
    return tl.where(fires, (2 * tl.log2(size) - tl.log2(denominator)) / temperature, float("-inf"))


@jit
def forward_kernel(
    x,
    rows,
    up,
    bias,
    up_bias,
    square_x,
    square_rows,
    epsilon,
    factor,
    coefficients,
    tops,
    masses,
    tokens,
    prototypes,
    tiles,
    width,
    x_token,
    x_feature,
    row,
    row_feature,
    up_row,
    up_feature,
    SIZE: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    CONVEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """One tile of ``coefficients`` (tokens, width); if convex also, per token and tile of
    prototypes, the power of two that it is relative to (its logarithm) and its mass."""
    down, across = _place(tokens, prototypes, BLOCK_TOKENS, BLOCK_PROTOTYPES)
    token = down.to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    prototype = across.to(tl.int64) * BLOCK_PROTOTYPES + tl.arange(0, BLOCK_PROTOTYPES)
    here = token < tokens
    there = prototype < prototypes
    dot, ups = _products(
        x,
        rows,
        up,
        down,
        across,
        tokens,
        prototypes,
        x_token,
        x_feature,
        row,
        row_feature,
        up_row,
        up_feature,
        SIZE,
        GATED,
        PRECISION,
        BLOCK_TOKENS,
        BLOCK_PROTOTYPES,
        BLOCK_FEATURES,
    )
    score, _, denominator = _terms(
        dot,
        tl.load(bias + prototype, mask=there, other=0.0),
        tl.load(square_x + token, mask=here, other=0.0),
        tl.load(square_rows + prototype, mask=there, other=0.0),
        tl.load(epsilon),
        ONE_SIDED,
    )
    if CONVEX:
        logarithm = _log2(score, denominator, tl.load(factor))
        top = tl.ceil(tl.max(logarithm, 1))
        value = tl.exp2(logarithm - tl.where(top == float("-inf"), 0.0, top)[:, None])
        tl.store(tops + token * tiles + across, top, mask=here)
        tl.store(masses + token * tiles + across, tl.sum(value, 1), mask=here)
    else:
        value = score * (score / denominator) * tl.load(factor)
    if GATED:
        if BIASED:
            ups += tl.load(up_bias + prototype, mask=there, other=0.0)[None, :]
        value *= ups
    coefficients += down.to(tl.int64) * BLOCK_TOKENS * width + across * BLOCK_PROTOTYPES
    place = tl.arange(0, BLOCK_TOKENS)[:, None] * width + tl.arange(0, BLOCK_PROTOTYPES)[None, :]
    tl.store(
        coefficients + place,
        value.to(coefficients.dtype.element_ty),
        mask=here[:, None] & there[None, :],
    )


@jit
def backward_kernel(
    x,
    rows,
    up,
    bias,
    up_bias,
    square_x,
    square_rows,
    epsilon,
    factor,
    shift,
    mean,
    unit_x,
    unit_rows,
    unit_up,
    gradient,
    coefficients,
    d_scores,
    d_ups,
    per_token,
    per_row,
    sum_scores,
    sum_ups,
    sum_epsilon,
    sum_factor,
    tokens,
    prototypes,
    tiles,
    x_token,
    x_feature,
    row,
    row_feature,
    up_row,
    up_feature,
    SIZE: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    CONVEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """One tile of ``coefficients`` and, times the units, of the gradients of x·w and x·u, from
    that of the coefficients; and the tile's sums over prototypes (per_token), over tokens (per_row,
    sum_scores, sum_ups) and over both."""
    down, across = _place(tokens, prototypes, BLOCK_TOKENS, BLOCK_PROTOTYPES)
    token = down.to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    prototype = across.to(tl.int64) * BLOCK_PROTOTYPES + tl.arange(0, BLOCK_PROTOTYPES)
    here = token < tokens
    there = prototype < prototypes
    both = here[:, None] & there[None, :]
    place = (
        tl.arange(0, BLOCK_TOKENS)[:, None] * prototypes + tl.arange(0, BLOCK_PROTOTYPES)[None, :]
    )
    base = down.to(tl.int64) * BLOCK_TOKENS * prototypes + across * BLOCK_PROTOTYPES
    gradient += base
    coefficients += base
    d_scores += base
    d_ups += base
    dot, ups = _products(
        x,
        rows,
        up,
        down,
        across,
        tokens,
        prototypes,
        x_token,
        x_feature,
        row,
        row_feature,
        up_row,
        up_feature,
        SIZE,
        GATED,
        PRECISION,
        BLOCK_TOKENS,
        BLOCK_PROTOTYPES,
        BLOCK_FEATURES,
    )
    score, distance, denominator = _terms(
        dot,
        tl.load(bias + prototype, mask=there, other=0.0),
        tl.load(square_x + token, mask=here, other=0.0),
        tl.load(square_rows + prototype, mask=there, other=0.0),
        tl.load(epsilon),
        ONE_SIDED,
    )
    score = tl.where(both, score, 0.0)  # nothing fires outside the matrix
    change = tl.load(gradient + place, mask=both, other=0.0).to(tl.float32)
    scale = tl.load(unit_x + token, mask=here, other=0.0)[:, None]
    if CONVEX:
        logarithm = _log2(score, denominator, tl.load(factor))
        value = tl.exp2(logarithm - tl.load(shift + token, mask=here, other=0.0)[:, None])
    else:
        value = score * (score / denominator) * tl.load(factor)
    if GATED:
        if BIASED:
            ups += tl.load(up_bias + prototype, mask=there, other=0.0)[None, :]
        d_up = change * value
        tl.store(sum_ups + down * prototypes + prototype, tl.sum(d_up, 0), mask=there)
        d_up *= scale * tl.load(unit_up + prototype, mask=there, other=0.0)[None, :]
        tl.store(d_ups + place, d_up.to(d_ups.dtype.element_ty), mask=both)
        tl.store(coefficients + place, (value * ups).to(coefficients.dtype.element_ty), mask=both)
        change *= ups
    else:
        tl.store(coefficients + place, value.to(coefficients.dtype.element_ty), mask=both)
    if CONVEX:  # π (dπ − Σ π dπ) is the gradient of log κ / τ
        change = value * (change - tl.load(mean + token, mask=here, other=0.0)[:, None])
        # 0.69… is ln 2: the logarithm is to base 2
        d_factor = (
            -change * tl.where(score != 0, logarithm, 0.0) * (0.6931471805599453 / tl.load(factor))
        )
        change /= tl.load(factor)
        direct = tl.where(score != 0, change / tl.where(score != 0, score, 1.0), 0.0)
        far = change / denominator
    else:
        direct = change * (score / denominator)
        d_factor = direct * score
        direct *= tl.load(factor)
        far = direct * (score / denominator)  # −∂/∂‖x − w‖²
    tl.store(sum_epsilon + tl.program_id(0), tl.sum(far))
    tl.store(sum_factor + tl.program_id(0), tl.sum(d_factor))
    tl.store(sum_scores + down * prototypes + prototype, tl.sum(2 * direct, 0), mask=there)
    far = tl.where(distance > 0, far, 0.0)
    tl.store(per_token + token * tiles + across, tl.sum(far, 1), mask=here)
    tl.store(per_row + down * prototypes + prototype, tl.sum(far, 0), mask=there)
    d_score = (
        2 * (direct + far) * scale * tl.load(unit_rows + prototype, mask=there, other=0.0)[None, :]
    )
    tl.store(d_scores + place, d_score.to(d_scores.dtype.element_ty), mask=both)


def _prune_shapes(shapes: list[Any], arguments: dict[str, Any], **more: Any) -> list[Any]:
    """Leave few warps to small tiles, the only ones that four warps have registers for."""
    is_small = {**arguments, **more}["BLOCK_TOKENS"] <= SMALL_TILE
    return [shape for shape in shapes if is_small or shape.num_warps == 8]


def _tune(kernel: Any) -> Any:
    """``kernel`` with the quickest of SHAPES for each size; None without Triton."""
    if triton is None:
        return None
    shapes = [
        triton.Config({"BLOCK_FEATURES": features}, num_warps=warps, num_stages=stages)
        for features, warps, stages in SHAPES
    ]
    tuned = triton.autotune(
        shapes[:1] if INTERPRETED else shapes,
        key=["prototypes", "SIZE", "GATED", "CONVEX", "PRECISION", "BLOCK_TOKENS"],
        prune_configs_by={"early_config_prune": _prune_shapes},
    )
    return tuned(kernel)


forward_tuned = _tune(forward_kernel)
backward_tuned = _tune(backward_kernel)
