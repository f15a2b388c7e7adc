"""The settings of a kernel-readout FFN, and the ``kernel_ffn`` entry of config.json.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

import ast
import copy
import difflib
import inspect
import re
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

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
INITIALISERS = ("single", "polarised", *AT_THE_DATA)
VALUES = ("fixed", "gated")


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
    """fixed output prototypes, or gated: each multiplied by its unit's u·x (gated FFNs)."""
    temperature: float | None = None
    """τ, the shares being map(log κ / τ). None: 1 where the coefficients are the kernel itself (mass with softmax
    or top-k), otherwise fitted per layer at conversion. Learned unless the coefficients are the kernel itself."""
    top_k: int | None = None
    """Prototypes kept per token by the simplex map top-k; kept on average over the text by threshold."""
    expansion: float | None = None
    """Prototypes per hidden unit, up to 8. Both signs of a gated unit take two, and 1.5 gives the parameter count of a gated
    FFN, those with the largest output kept; 4 stand in for a gated unit by two pairs, which is much closer, and 2 for a plain
    one. None: 2 where a unit needs both signs, otherwise 1."""

    def __post_init__(self):
        one_of("simplex", self.simplex, SIMPLEX_MAPS)
        one_of("intensity", self.intensity, INTENSITIES)
        one_of("values", self.values, VALUES)
        if self.init is not None:
            one_of("init", self.init, INITIALISERS)
        if not get_kernel(self.kernel).nonnegative:
            raise InputError(f"kernel {self.kernel!r} can be negative: its readout is no mixture; choose a nonnegative kernel")
        _number("temperature", self.temperature, lambda t: 0 < t < float("inf"), "a positive number")
        _number("expansion", self.expansion, lambda e: 1 <= e <= 8, "a number from 1 to 8")
        if self.sparse and (not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1):
            raise InputError(
                f"found top_k={self.top_k!r}, expected a positive integer: simplex {self.simplex!r} needs to know how many"
            )
        if not self.sparse and self.top_k is not None:
            raise InputError(
                f"found top_k={self.top_k} with simplex {self.simplex!r}: only 'top-k' and 'threshold' keep a given number"
            )
        if self.values == "gated" and self.init == "polarised":
            raise InputError("values 'gated' with init 'polarised': gated values carry the sign already; use init 'single'")

    @property
    def sparse(self) -> bool:
        """``top_k`` prototypes are kept, for every token or on average."""
        return self.simplex in ("top-k", "threshold")

    @property
    def coefficients_are_kernel(self) -> bool:
        """Coefficients are scale · κ on the support, no shares needed: mass over softmax, top-k or threshold at τ = 1."""
        return self.intensity == "mass" and (self.simplex == "softmax" or self.sparse) and self.temperature in (None, 1.0)

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
    """Rows of the dictionary."""
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

    def to_dict(self) -> dict:
        return {**asdict(self), "absorbed": list(self.absorbed)}

    @classmethod
    def from_dict(cls, entry: dict) -> "LayerConfig":
        """InputError if a key is unknown or missing, or a value out of range."""
        entry = dict(_mapping("kernel_ffn layer", entry))
        known(cls, entry, "kernel_ffn layer")
        settings = _mapping("kernel_ffn settings", entry.pop("settings", None))
        known(KernelFFNConfig, settings, "kernel_ffn settings")
        for name in ("hidden_size", "prototypes"):
            size = entry.get(name)
            if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 2**31:
                raise InputError(
                    f"found {name}={size!r} in the kernel_ffn entry, expected a positive integer: config.json is damaged"
                )
        settings = KernelFFNConfig(**settings)
        reference = _mapping("kernel_ffn reference", entry.get("reference"))
        needed = [*get_kernel(settings.kernel).parameters]
        needed += ["scale"] * (settings.intensity != "none") + ["temperature"] * (not settings.coefficients_are_kernel)
        needed += ["threshold"] * (settings.simplex == "threshold")
        for name in needed:
            if reference.get(name) is None:
                raise InputError(
                    f"found no reference value {name!r} in the kernel_ffn entry, expected one: config.json is damaged"
                )
            _number(
                f"reference {name}",
                reference[name],
                lambda v: 0 < v < float("inf"),
                "a positive number: config.json is damaged",
            )
        entry["absorbed"] = tuple(entry.get("absorbed", ()))
        return cls(settings=settings, **entry)


def known(cls, entry: dict, what: str) -> None:
    """InputError, with the nearest right name, if ``entry`` has a key that is no field of dataclass ``cls``."""
    known_keys([f.name for f in fields(cls)], entry, what)


def known_keys(names, entry: dict, what: str) -> None:
    """The same, of keys that are given."""
    for key in entry:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(names)}"
            raise InputError(f"found unknown key {key!r} in the {what}: {hint}")


def with_defaults(config: KernelFFNConfig, gated_teacher: bool) -> KernelFFNConfig:
    """``config`` with its initialiser and expansion resolved for a gated or plain teacher FFN.

    Raises:
        InputError: the combination does not exist for such an FFN.
    """
    if not gated_teacher:
        if config.values == "gated":
            raise InputError("found values 'gated' for an FFN without a gate: its units have one row each; use values 'fixed'")
        if config.init == "polarised":
            raise InputError("found init 'polarised' for an FFN without a gate: it splits a unit's two rows; use init 'single'")
    kernel = get_kernel(config.kernel)
    init = config.init
    if init is None and kernel.uses_distance and not kernel.uses_bias:
        init = "data-scale"  # a kernel of distance alone sees nothing of rows much shorter than the inputs
    init = init or ("polarised" if gated_teacher and config.values == "fixed" else "single")
    if "bandwidth" in kernel.parameters.values() and config.intensity == "mass" and init not in AT_THE_DATA:
        raise InputError(
            f"found intensity 'mass' with kernel {config.kernel!r} and init {init!r}: its mass vanishes on prototypes much shorter "
            "than the inputs; use init 'data-scale' or another intensity"
        )
    resolved = replace(config, init=init)
    return replace(resolved, expansion=config.expansion or (2.0 if both_signs(resolved, gated_teacher) else 1.0))


def both_signs(config: KernelFFNConfig, gated_teacher: bool) -> bool:
    """Whether a unit is stood in for by prototypes of both signs, from its gate row plus and minus its up row."""
    return gated_teacher and config.values == "fixed" and config.init != "single"


class KernelConfigMixin:
    """What a family's config class adds to the stock one: it reads, guards and writes the ``kernel_ffn`` entry.

    A subclass gives ``auto_classes``, the classes of its own file by Auto class name.
    """

    auto_classes: dict = {}
    _auto_class = None  # of a stock class that came with code of its own: save_pretrained() below saves the code
    kernel_ffn: Any

    def __post_init__(self, **kwargs):
        entry = _mapping("kernel_ffn entry of config.json", self.kernel_ffn) if self.kernel_ffn is not None else None
        if entry is not None:
            if entry.get("format") != FORMAT:
                raise InputError(
                    f"found kernel_ffn format {entry.get('format')!r}, expected {FORMAT}: install the hf_kernel_ffn that wrote it, "
                    f"version {entry.get('package_version')!r}"
                )
            known_keys(ENTRY, entry, "kernel_ffn entry")
            for name, value in _mapping("kernel_ffn activation", entry.get("activation")).items():
                if "." not in name and getattr(self, name, kwargs.get(name)) == STOCK_GUARD:
                    setattr(self, name, value)
                    kwargs.pop(name, None)
            self.kernel_ffn_layers()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As the stock method. The guard is taken out first: where it stands for a number, no config would accept it."""
        config_dict = copy.deepcopy(config_dict)
        entry = config_dict.get("kernel_ffn")
        for name, value in (entry.get("activation") or {} if isinstance(entry, dict) else {}).items():
            _put(config_dict, name, value, only=STOCK_GUARD)
        return super().from_dict(config_dict, **kwargs)

    def kernel_ffn_layers(self) -> dict:
        """LayerConfig of every converted FFN by its path under the base model, in layer order."""
        layers = _mapping("kernel_ffn layers", (self.kernel_ffn or {}).get("layers"))
        for path in layers:
            if not re.fullmatch(r"(?!.*__)\w+(\.\w+)*", path):  # it is looked up as attributes of the model
                raise InputError(
                    f"found {path!r} in the kernel_ffn layers, expected the path of an FFN: config.json is damaged"
                )
        found = {path: LayerConfig.from_dict(layer) for path, layer in layers.items()}

        # By number, not as it stands: config.json is written with its keys in alphabetical order, 10 before 2.
        def place(path):
            return found[path].number, [(part.isdigit(), int(part) if part.isdigit() else part) for part in path.split(".")]

        return {path: found[path] for path in sorted(found, key=place)}

    def to_dict(self):
        output = super().to_dict()
        if self.kernel_ffn is not None:
            for name in self.kernel_ffn["activation"]:
                _put(output, name, STOCK_GUARD)
        return output

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As the stock method; also writes the code that loads the checkpoint, and an auto_map for every head."""
        custom = get_custom_kernel_file(self)  # before anything is written: it may refuse
        files = code_files(type(self))
        stem = type(self).__module__.rpartition(".")[2]
        self.auto_map = {auto: f"{stem}.{name}" for auto, name in self.auto_classes.items()}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for file, source in files.items():
            Path(save_directory, file).write_text(source, encoding="utf-8")
        if custom is not None:
            Path(save_directory, "custom_kernel.py").write_text(custom, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


TRAVELLING = (
    "errors.py", "kernels.py", "custom_kernel.py", "simplex.py", "configuration.py", "operators.py", "one_pass.py", "linears.py",
    "readout.py", "integrity.py", "modeling.py",
)  # fmt: skip
"""Files that every checkpoint carries, beside its family's own modelling file."""


def code_files(config_class) -> dict:
    """Source by file name of the code that a checkpoint of ``config_class`` carries."""
    own = {file: Path(__file__).with_name(file).read_text(encoding="utf-8") for file in TRAVELLING}
    module = sys.modules[config_class.__module__]
    made = getattr(module, "CODE_FILES", None)  # in the package, whose modelling files are written when they are needed
    if made is None:
        made, wanted = {}, [Path(str(module.__file__)).stem]
        while wanted:
            file = f"{wanted.pop()}.py"
            made[file] = Path(__file__).with_name(file).read_text(encoding="utf-8")
            imported = re.findall(r"^from \.(\w+) import", made[file], flags=re.MULTILINE)
            wanted += [name for name in imported if f"{name}.py" not in {**own, **made}]
    return {**own, **made}


def get_custom_kernel_file(config) -> str | None:
    """Source of the one file that registers the user's own kernels used by ``config``, as it must stand in a
    checkpoint; None if every kernel is the package's.

    Raises:
        InputError: the kernels stand in several files, or in none that could travel.
    """
    files = set()
    for layer in config.kernel_ffn_layers().values():
        kind = type(get_kernel(layer.settings.kernel))
        if kind.__module__ == get_kernel.__module__:
            continue
        try:
            file = inspect.getsourcefile(kind)
        except TypeError:
            file = None
        if file is None or kind.__module__ == "__main__" or not Path(file).is_file():
            raise InputError(
                f"kernel {layer.settings.kernel!r} stands in {kind.__module__!r}, which cannot travel with a checkpoint: "
                "put its class and its registration into a .py file of their own and import that"
            )
        files.add(file)
    if not files:
        return None
    if len(files) > 1:
        raise InputError(
            f"found kernels of your own in {len(files)} files, expected one: put {', '.join(sorted(files))} together"
        )
    source = Path(files.pop()).read_text(encoding="utf-8")
    # Absolute imports of the package do not exist where the checkpoint is loaded without it.
    source = re.sub(r"^from hf_kernel_ffn(\.kernels)? import", "from .kernels import", source, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(source)):
        wanted = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names if alias.name.split(".")[0] == "hf_kernel_ffn"]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "hf_kernel_ffn":
            wanted = [str(node.module)]
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and node.module == "kernels":
            wanted = [
                f"hf_kernel_ffn.{a.name}"
                for a in node.names
                if a.name not in ("Kernel", "register_kernel", "KERNELS", "get_kernel")
            ]
        if wanted:
            raise InputError(
                f"found {wanted[0]} imported in a kernel's file, which a checkpoint does not carry: "
                "write 'from hf_kernel_ffn import Kernel, register_kernel' and import nothing else of the package"
            )
    return source


def one_of(name, value, choices):
    """InputError unless ``value`` is one of the names ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"found {name}={value!r}, expected one of {', '.join(choices)}")


def _number(name, value, accept, expected):
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not accept(value):
        raise InputError(f"found {name}={value!r}, expected {expected}")


def _put(mapping, path, value, only=None):
    """Set ``value`` at a dotted ``path`` of nested dicts, as far as it exists; only over the value ``only``, if that is given."""
    *parents, name = path.split(".")
    for parent in parents:
        mapping = mapping.get(parent) if isinstance(mapping, dict) else None
    if isinstance(mapping, dict) and (only is None or mapping.get(name) == only):
        mapping[name] = value


def _mapping(what, value):
    if not isinstance(value, dict):
        raise InputError(f"found {type(value).__name__} as the {what}, expected a mapping: config.json is damaged")
    return value
