"""The settings of a kernel-readout FFN, and what they are where they are not given.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .checks import (
    is_positive_integer,
    require_number,
    require_one_of,
    require_positive_number,
)
from .custom_kernel import __doc__ as _custom_kernel  # noqa: F401  (registers a user's own kernel)
from .errors import InputError
from .kernels import get_kernel
from .simplex import SIMPLEX_MAPS

INTENSITIES = ("none", "mass", "gate")
"""How loudly a mixture may be written."""
AT_THE_DATA = ("data-scale", "firing-means")
"""Initialisers whose input prototypes are as long as the inputs, so that distance can matter."""
INITIALISERS = ("single", "polarised", *AT_THE_DATA, "pieces")
"""Where input prototypes may start."""
VALUES = ("fixed", "gated", "product")
"""What output prototypes may be."""
ROWS = ("free", "tied")
"""Whose input prototypes are: their own, or made of their unit's rows."""
PIECES = 8
"""Kernels that stand in for a unit unless settings say how many.

On SmolLM2's layers 3 and 20, six leave 0.001 and 0.0004 of the variance unexplained, eight 0.0003
and 0.0001, twelve 0.0001 and 0.00003.
"""
PLAIN_PIECES = 7
"""The same where the FFN has no gate and a unit two rows in all: eight would add more than 2% to
the parameters of a MiniLM."""
MOST_PIECES = 32
"""Kernels per unit, at most: every one is an elementwise step of the forward pass."""
DEFAULT_KERNELS = {"free": "half-yat", "tied": "brownian"}
"""The kernel unless settings say which, by the rows.

Of the kernels that stand in for a unit as closely as brownian does, it alone is positive definite.
"""
LARGEST_EXPANSION = 8
"""Prototypes per hidden unit, at most: more stand in for a unit no more closely."""


@dataclass(frozen=True)
class KernelFFNConfig:
    """What is to replace an FFN.

    Validates itself: InputError names the field and the reason.
    """

    kernel: str = ""
    """Similarity of input and input prototypes: a registered kernel that is nowhere negative.

    Left empty: brownian where rows are tied, half-yat where they are free.
    """
    simplex: str = "softmax"
    """How log-kernels become shares: softmax, sparsemax, entmax-1.5, top-k or threshold.

    top-k keeps as many prototypes for every token; threshold keeps those whose kernel passes one
    value per layer, more for a token that needs more.
    """
    intensity: str = "mass"
    """How loudly the mixture is written: none, mass or gate.

    none is convex; mass is Σκ over the support, times a learned scale; gate is a learned softplus
    of the input.
    """
    init: str | None = None
    """Where input prototypes start: single, polarised, data-scale or firing-means.

    The first three start from the rows of W_in: polarised with both signs of every output
    prototype of a gated FFN, data-scale with rows as long as the inputs. firing-means starts from
    the mean input that fires a unit, one for each sign of a gated unit. pieces goes with tied rows.
    None: the family's default.
    """
    values: str | None = None
    """fixed, gated or product.

    fixed output prototypes are the unit's own; gated ones are multiplied by its u·x (gated FFNs,
    free rows); product makes kernels products with relu(±u·x), which write v or −v (gated FFNs,
    tied rows). None: product where rows are tied and the FFN has a gate, otherwise fixed.
    """
    temperature: float | None = None
    """τ, the shares being map(log κ / τ).

    None: 1 where the coefficients are the kernel itself (mass with softmax, top-k or threshold),
    and otherwise fitted per layer at conversion. It is learned in the second case alone.
    """
    top_k: int | None = None
    """Prototypes kept per token by the simplex map top-k; by threshold, on average over text.

    Where rows are tied, units are kept, each of which writes v or −v.
    """
    expansion: float | None = None
    """Prototypes per hidden unit, from 1 to 8.

    Both signs of a gated unit take two; 1.5 gives the parameter count of a gated FFN, the units
    with the largest output kept; 4 stand in for a gated unit by two pairs, which is much closer,
    and 2 for a plain one. None: 2 where a unit needs both signs, otherwise 1.
    """

    rows: str = "free"
    """free or tied.

    free: every input prototype is a row of its own. tied: every unit is a sum of ``pieces`` kernels
    in the plane of its own rows, at the parameters and matrix products of the stock FFN.
    """
    pieces: int | None = None
    """Kernels per unit where rows are tied. None: 8, or 7 where the FFN has no gate."""
    skip: bool = False
    """Write a linear map of the input beside the mixture, as skip transcoders do (tied rows).

    It is fitted together with the output prototypes, and belongs to no prototype: what it writes is
    told apart from the mixture.
    """

    def __post_init__(self) -> None:
        require_one_of("rows", self.rows, ROWS)
        if not isinstance(self.skip, bool):
            raise InputError(f"found skip={self.skip!r}, expected true or false")
        self._choose_by_rows()
        require_one_of("simplex", self.simplex, SIMPLEX_MAPS)
        require_one_of("intensity", self.intensity, INTENSITIES)
        if self.values is not None:
            require_one_of("values", self.values, VALUES)
        if self.init is not None:
            require_one_of("init", self.init, INITIALISERS)
        if not get_kernel(self.kernel).nonnegative:
            raise InputError(
                f"kernel {self.kernel!r} can be negative: its readout is no mixture; "
                "choose a nonnegative kernel"
            )
        if self.temperature is not None:
            require_positive_number("temperature", self.temperature, "a positive number")
        if self.expansion is not None:
            require_number(
                "expansion",
                self.expansion,
                f"a number from 1 to {LARGEST_EXPANSION}",
                least=1,
                most=LARGEST_EXPANSION,
            )
        self._check_top_k()
        self._check_rows()
        if self.values == "gated" and self.init == "polarised":
            raise InputError(
                "values 'gated' with init 'polarised': gated values carry the sign already; "
                "use init 'single'"
            )

    def _choose_by_rows(self) -> None:
        """Choose what is not given and follows from the rows alone."""
        if not self.kernel:
            object.__setattr__(self, "kernel", DEFAULT_KERNELS[self.rows])
        if self.values is None and self.rows == "free":
            object.__setattr__(self, "values", "fixed")

    def _check_rows(self) -> None:
        """InputError where a setting does not go with the rows."""
        if self.rows == "free":
            if get_kernel(self.kernel).uses_knot:
                raise InputError(
                    f"found kernel {self.kernel!r} with rows 'free', expected rows 'tied' with it: "
                    "its prototypes are knots on the line of a unit's row; set rows"
                )
            if self.values == "product" or self.pieces is not None or self.init == "pieces":
                raise InputError(
                    "found values 'product', init 'pieces' or a number of pieces with rows 'free', "
                    "expected rows 'tied' with them: set rows, or leave them out"
                )
            if self.skip:
                raise InputError(
                    "found skip with rows 'free', expected rows 'tied' with it: set rows, or leave "
                    "it out"
                )
            return

        expected: dict[str, tuple[object, ...]] = {
            "simplex": ("softmax", "top-k", "threshold"),
            "intensity": ("mass",),
            "values": (None, "fixed", "product"),
            "init": (None, "pieces"),
            "temperature": (None, 1.0),
            "expansion": (None,),
        }
        for name, choices in expected.items():
            value = getattr(self, name)
            if value not in choices:
                raise InputError(
                    f"found {name}={value!r} with rows 'tied', expected "
                    f"{' or '.join(map(repr, choices))}: leave it out, or set rows to 'free'"
                )
        count = self.pieces
        if count is not None and not (is_positive_integer(count) and count <= MOST_PIECES):
            raise InputError(f"found pieces={count!r}, expected an integer from 1 to {MOST_PIECES}")

    def _check_top_k(self) -> None:
        if self.sparse and not is_positive_integer(self.top_k):
            raise InputError(
                f"found top_k={self.top_k!r}, expected a positive integer: "
                f"simplex {self.simplex!r} needs to know how many"
            )
        if not self.sparse and self.top_k is not None:
            raise InputError(
                f"found top_k={self.top_k} with simplex {self.simplex!r}: "
                "only 'top-k' and 'threshold' keep a given number"
            )

    @property
    def sparse(self) -> bool:
        """Whether ``top_k`` prototypes are kept, for every token or on average."""
        return self.simplex in ("top-k", "threshold")

    @property
    def coefficients_are_kernel(self) -> bool:
        """Whether the coefficients are scale · κ on the support, and no shares are needed.

        So it is with mass over softmax, top-k or threshold at τ = 1.
        """
        return (
            self.intensity == "mass"
            and (self.simplex == "softmax" or self.sparse)
            and self.temperature in (None, 1.0)
        )

    @property
    def regime(self) -> str:
        """convex, conic or linear: what may be said about the coefficients; and ``+ linear`` where
        a linear map is written beside them."""
        if self.values == "gated":
            return "linear"
        regime = "convex" if self.intensity == "none" else "conic"
        return f"{regime} + linear" if self.skip else regime


DEFAULT_SETTINGS = KernelFFNConfig(rows="tied")
"""What a conversion takes where nothing is said: the most faithful settings.

SmolLM2-135M converted by them without any text is within a KL of 0.002 nats of its teacher; with
two free prototypes per unit it is 0.6 nats away.
"""


def make_settings(fields: Mapping[str, Any]) -> KernelFFNConfig:
    """The settings for which a command line or a recipe gives these ``fields``.

    Without any they are DEFAULT_SETTINGS. Otherwise rows are free unless ``rows``, ``pieces`` or
    values ``product`` say that they are tied, since most fields are of free rows alone.

    Raises:
        InputError: a field or the combination is refused.
    """
    if not fields:
        return DEFAULT_SETTINGS
    if "rows" in fields:
        return KernelFFNConfig(**fields)
    is_tied = "pieces" in fields or fields.get("values") == "product" or fields.get("skip")
    return KernelFFNConfig(**fields, rows="tied" if is_tied else "free")


def resolve_defaults(config: KernelFFNConfig, gated_teacher: bool) -> KernelFFNConfig:
    """``config`` with all that it leaves open chosen for a gated or plain teacher FFN.

    That is its values, its initialiser, and its expansion or number of pieces.

    Raises:
        InputError: the combination does not exist for such an FFN.
    """
    if config.values is None:
        config = replace(config, values="product" if gated_teacher else "fixed")
    if not gated_teacher and config.values == "gated":
        raise InputError(
            "found values 'gated' for an FFN without a gate: its units have one row each; "
            "use values 'fixed'"
        )
    if not gated_teacher and config.init == "polarised":
        raise InputError(
            "found init 'polarised' for an FFN without a gate: it splits a unit's two rows; "
            "use init 'single'"
        )
    if not gated_teacher and config.values == "product":
        raise InputError(
            "found values 'product' for an FFN without a gate: its units have one row each; "
            "use values 'fixed'"
        )
    if gated_teacher and config.values == "fixed" and get_kernel(config.kernel).uses_knot:
        raise InputError(
            f"found values 'fixed' with kernel {config.kernel!r} for an FFN with a gate, expected "
            "'product': its knots lie on one line, and the product is what makes a plane of it; "
            "leave values out, or choose kernel 'half-yat'"
        )
    if config.rows == "tied":
        default = PIECES if gated_teacher else PLAIN_PIECES
        return replace(config, init="pieces", pieces=config.pieces or default)

    init = config.init or _choose_initialiser(config, gated_teacher)
    needs_bandwidth = "bandwidth" in get_kernel(config.kernel).parameters.values()
    if needs_bandwidth and config.intensity == "mass" and init not in AT_THE_DATA:
        raise InputError(
            f"found intensity 'mass' with kernel {config.kernel!r} and init {init!r}: its mass "
            "vanishes on prototypes much shorter than the inputs; "
            "use init 'data-scale' or another intensity"
        )

    resolved = replace(config, init=init)
    default_expansion = 2.0 if needs_both_signs(resolved, gated_teacher) else 1.0
    return replace(resolved, expansion=config.expansion or default_expansion)


def _choose_initialiser(config: KernelFFNConfig, gated_teacher: bool) -> str:
    """The family's default."""
    kernel = get_kernel(config.kernel)
    if kernel.uses_distance and not kernel.uses_bias:
        # A kernel of distance alone sees nothing of rows much shorter than the inputs.
        return "data-scale"
    return "polarised" if gated_teacher and config.values == "fixed" else "single"


def needs_both_signs(config: KernelFFNConfig, gated_teacher: bool) -> bool:
    """Whether a unit becomes prototypes of both signs, its gate row plus and minus its up row."""
    return gated_teacher and config.values == "fixed" and config.init != "single"
