"""The settings of a kernel-readout FFN, and how config.json records a converted one.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

import difflib
from dataclasses import asdict, dataclass, field, fields, replace

from .custom_kernel import __doc__ as _custom_kernel  # noqa: F401  (registers a user's own kernel)
from .errors import InputError
from .kernels import get_kernel
from .simplex import SIMPLEX_MAPS

FORMAT = 1
"""Version of the ``kernel_ffn`` entry that this code writes and reads."""
ENTRY = ("format", "package_version", "family", "teacher_class", "activation", "layers")
"""Keys of the ``kernel_ffn`` entry."""
STOCK_GUARD = "kernel_ffn checkpoint: load it by an Auto class with trust_remote_code=True, or with hf_kernel_ffn installed"
"""Stands in config.json where the teacher's activation name was, so that stock classes refuse the checkpoint."""

INTENSITIES = ("none", "mass", "gate")
AT_THE_DATA = ("data-scale", "firing-means")
"""Initialisers whose input prototypes are as long as the inputs, so that distance can matter."""
INITIALISERS = ("single", "polarised", *AT_THE_DATA, "pieces")
VALUES = ("fixed", "gated", "product")
ROWS = ("free", "tied")
PIECES = 8
"""Kernels that stand in for a unit unless settings say how many. On SmolLM2's layers 3 and 20 six leave
0.001 and 0.0004 of the variance unexplained, eight 0.0003 and 0.0001, twelve 0.0001 and 0.00003."""
MOST_PIECES = 32


@dataclass(frozen=True)
class KernelFFNConfig:
    """What is to replace an FFN. Validates itself; raises InputError naming the field and the reason."""

    kernel: str = "half-yat"
    """Similarity between input and input prototypes: a registered kernel that is nowhere negative."""
    simplex: str = "softmax"
    """How log-kernels become shares: softmax, sparsemax, entmax-1.5, top-k (as many prototypes for every token) or threshold
    (those whose kernel passes one value per layer: more for a token that needs more)."""
    intensity: str = "mass"
    """How loudly the mixture is written: none (convex), mass (Σκ over the support, times a learned scale) or
    gate (a learned softplus of the input)."""
    init: str | None = None
    """Input prototypes from the rows of W_in: single, polarised (gated FFNs, both signs of every output
    prototype), or data-scale (those rows made as long as the inputs); or firing-means (the mean input that fires a unit, one
    for each sign of a gated unit). None: the family's default."""
    values: str = "fixed"
    """fixed output prototypes; gated, each multiplied by its unit's u·x (gated FFNs, free rows); or
    product, kernels times relu(±u·x), which write v or −v (gated FFNs, tied rows)."""
    temperature: float | None = None
    """τ, the shares being map(log κ / τ). None: 1 where the coefficients are the kernel itself (mass with softmax
    or top-k), otherwise fitted per layer at conversion. Learned unless the coefficients are the kernel itself."""
    top_k: int | None = None
    """Prototypes kept per token by the simplex map top-k; kept on average over the text by threshold."""
    expansion: float | None = None
    """Prototypes per hidden unit, up to 8. Both signs of a gated unit take two, and 1.5 gives the parameter count of a gated
    FFN, those with the largest output kept; 4 stand in for a gated unit by two pairs, which is much closer, and 2 for a plain
    one. None: 2 where a unit needs both signs, otherwise 1."""

    rows: str = "free"
    """free: every input prototype is a row of its own. tied: every unit is a sum of ``pieces`` kernels
    in the plane of its own rows, at the parameters and products of the stock FFN (softmax and mass)."""
    pieces: int | None = None
    """Kernels per unit where rows are tied. None: 8."""

    def __post_init__(self):
        require_one_of("simplex", self.simplex, SIMPLEX_MAPS)
        require_one_of("intensity", self.intensity, INTENSITIES)
        require_one_of("values", self.values, VALUES)
        if self.init is not None:
            require_one_of("init", self.init, INITIALISERS)
        if not get_kernel(self.kernel).nonnegative:
            raise InputError(
                f"kernel {self.kernel!r} can be negative: its readout is no mixture; choose a nonnegative kernel"
            )
        _require_number(
            "temperature", self.temperature, lambda t: 0 < t < float("inf"), "a positive number"
        )
        _require_number("expansion", self.expansion, lambda e: 1 <= e <= 8, "a number from 1 to 8")
        if self.sparse and (
            not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1
        ):
            raise InputError(
                f"found top_k={self.top_k!r}, expected a positive integer: simplex {self.simplex!r} needs to know how many"
            )
        if not self.sparse and self.top_k is not None:
            raise InputError(
                f"found top_k={self.top_k} with simplex {self.simplex!r}: only 'top-k' and 'threshold' keep a given number"
            )
        require_one_of("rows", self.rows, ROWS)
        if self.rows == "tied":
            self._require_tied_settings()
        elif self.values == "product" or self.pieces is not None or self.init == "pieces":
            raise InputError(
                "found values 'product', init 'pieces' or a number of pieces with rows 'free', "
                "expected rows 'tied' with them: set rows, or leave them out"
            )
        if self.values == "gated" and self.init == "polarised":
            raise InputError(
                "values 'gated' with init 'polarised': gated values carry the sign already; use init 'single'"
            )

    def _require_tied_settings(self) -> None:
        """InputError where a setting does not go with tied rows."""
        expected = {
            "simplex": ("softmax",),
            "intensity": ("mass",),
            "values": ("fixed", "product"),
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
        if count is not None and (type(count) is not int or not 1 <= count <= MOST_PIECES):
            raise InputError(f"found pieces={count!r}, expected an integer from 1 to {MOST_PIECES}")

    @property
    def sparse(self) -> bool:
        """``top_k`` prototypes are kept, for every token or on average."""
        return self.simplex in ("top-k", "threshold")

    @property
    def coefficients_are_kernel(self) -> bool:
        """Coefficients are scale · κ on the support, no shares needed: mass over softmax, top-k or threshold at τ = 1."""
        return (
            self.intensity == "mass"
            and (self.simplex == "softmax" or self.sparse)
            and self.temperature in (None, 1.0)
        )

    @property
    def regime(self) -> str:
        """convex, conic or linear: what may be said about the coefficients."""
        if self.values == "gated":
            return "linear"
        return "convex" if self.intensity == "none" else "conic"


@dataclass(frozen=True)
class LayerConfig:
    """One converted FFN as config.json records it: everything needed to rebuild the module."""

    settings: KernelFFNConfig
    """What was asked for, with the initialiser resolved."""
    hidden_size: int
    """Width of the residual stream."""
    prototypes: int
    """Input prototypes: rows of the dictionary, or the units that pieces are tied to."""
    reference: dict = field(default_factory=dict)
    """What conversion found for this layer, exact: ``scale`` of the intensity, ``temperature``, ``threshold`` of κ, and the
    kernel's parameters. The weights hold learned log-ratios to these, zero at conversion, so that half precision loses nothing."""
    dropout: float = 0.0
    """The teacher FFN's dropout on its output."""
    hidden_dropout: float = 0.0
    """The teacher FFN's dropout on its hidden units, here on the coefficients."""
    number: int = 0
    """Of the block, counted over all stacks."""
    absorbed: tuple[str, ...] = ()
    """Paths under the base model of what the readout makes needless, where the FFN was no module of its own: modules there
    become the identity, numbers zero."""
    experts: int = 0
    """If this is one expert of a mixture, how many there are."""
    gated: bool = False
    """Where rows are tied, whether the teacher's units have two rows."""

    def to_dict(self) -> dict:
        return {**asdict(self), "absorbed": list(self.absorbed)}

    @classmethod
    def from_dict(cls, entry: dict) -> "LayerConfig":
        """InputError if a key is unknown or missing, or a value out of range."""
        entry = dict(require_mapping("kernel_ffn layer", entry))
        reject_unknown_fields(cls, entry, "kernel_ffn layer")
        settings = require_mapping("kernel_ffn settings", entry.pop("settings", None))
        reject_unknown_fields(KernelFFNConfig, settings, "kernel_ffn settings")
        for name in ("hidden_size", "prototypes"):
            size = entry.get(name)
            if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 2**31:
                raise InputError(
                    f"found {name}={size!r} in the kernel_ffn entry, expected a positive integer: config.json is damaged"
                )
        settings = KernelFFNConfig(**settings)
        reference = require_mapping("kernel_ffn reference", entry.get("reference"))
        needed = [*get_kernel(settings.kernel).parameters]
        needed += ["scale"] * (settings.intensity != "none") + ["temperature"] * (
            not settings.coefficients_are_kernel
        )
        needed += ["threshold"] * (settings.simplex == "threshold")
        for name in needed:
            if reference.get(name) is None:
                raise InputError(
                    f"found no reference value {name!r} in the kernel_ffn entry, expected one: config.json is damaged"
                )
            _require_number(
                f"reference {name}",
                reference[name],
                lambda v: 0 < v < float("inf"),
                "a positive number: config.json is damaged",
            )
        entry["absorbed"] = tuple(entry.get("absorbed", ()))
        return cls(settings=settings, **entry)


def reject_unknown_fields(cls, entry: dict, what: str) -> None:
    """InputError, with the nearest right name, if ``entry`` has a key that is no field of dataclass ``cls``."""
    reject_unknown_keys([f.name for f in fields(cls)], entry, what)


def reject_unknown_keys(names, entry: dict, what: str) -> None:
    """The same, of keys that are given."""
    for key in entry:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(names)}"
            raise InputError(f"found unknown key {key!r} in the {what}: {hint}")


def choose_default_settings(gated_teacher: bool) -> KernelFFNConfig:
    """The most faithful settings for an FFN, which a conversion takes when it is given none.

    On SmolLM2-135M without any text they lose 0.002 nats, where 2 free prototypes per unit lose 0.6.
    """
    values = "product" if gated_teacher else "fixed"
    return KernelFFNConfig(kernel="root-half-yat", values=values, rows="tied")


def resolve_defaults(config: KernelFFNConfig, gated_teacher: bool) -> KernelFFNConfig:
    """``config`` with its initialiser and expansion resolved for a gated or plain teacher FFN.

    Raises:
        InputError: the combination does not exist for such an FFN.
    """
    if not gated_teacher:
        if config.values == "gated":
            raise InputError(
                "found values 'gated' for an FFN without a gate: its units have one row each; use values 'fixed'"
            )
        if config.init == "polarised":
            raise InputError(
                "found init 'polarised' for an FFN without a gate: it splits a unit's two rows; use init 'single'"
            )
    if config.rows == "tied":
        if config.values == "product" and not gated_teacher:
            raise InputError(
                "found values 'product' for an FFN without a gate: its units have one row each; use "
                "values 'fixed'"
            )
        return replace(config, init="pieces", pieces=config.pieces or PIECES)
    kernel = get_kernel(config.kernel)
    init = config.init
    if init is None and kernel.uses_distance and not kernel.uses_bias:
        init = "data-scale"  # a kernel of distance alone sees nothing of rows much shorter than the inputs
    init = init or ("polarised" if gated_teacher and config.values == "fixed" else "single")
    if (
        "bandwidth" in kernel.parameters.values()
        and config.intensity == "mass"
        and init not in AT_THE_DATA
    ):
        raise InputError(
            f"found intensity 'mass' with kernel {config.kernel!r} and init {init!r}: its mass vanishes on prototypes much shorter "
            "than the inputs; use init 'data-scale' or another intensity"
        )
    resolved = replace(config, init=init)
    return replace(
        resolved,
        expansion=config.expansion or (2.0 if needs_both_signs(resolved, gated_teacher) else 1.0),
    )


def needs_both_signs(config: KernelFFNConfig, gated_teacher: bool) -> bool:
    """Whether a unit is stood in for by prototypes of both signs, from its gate row plus and minus its up row."""
    return gated_teacher and config.values == "fixed" and config.init != "single"


def require_one_of(name, value, choices):
    """InputError unless ``value`` is one of the names ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"found {name}={value!r}, expected one of {', '.join(choices)}")


def _require_number(name, value, accept, expected):
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not accept(value):
        raise InputError(f"found {name}={value!r}, expected {expected}")


def require_mapping(what, value):
    if not isinstance(value, dict):
        raise InputError(
            f"found {type(value).__name__} as the {what}, expected a mapping: config.json is damaged"
        )
    return value
