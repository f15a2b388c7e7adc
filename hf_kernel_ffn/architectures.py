"""The table of architectures, how a model's FFNs are found by it, and how one is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .checkpoint_code.errors import InputError
from .checkpoint_code.experts import KernelExperts
from .checkpoint_code.record import Readout
from .families import FAMILIES, Architecture

ARCHITECTURES: dict[str, Architecture] = {family.model_type: family for family in FAMILIES}
ENTRY_POINTS = "hf_kernel_ffn.architectures"
"""Group of entry points by which other packages bring architectures: the name is the model_type, the object an Architecture."""


def register_architecture(architecture: Architecture) -> Architecture:
    """Add a family to the table; InputError if its model_type is taken."""
    if architecture.model_type in ARCHITECTURES:
        raise InputError(f"an architecture for {architecture.model_type!r} is already registered")
    ARCHITECTURES[architecture.model_type] = architecture
    return architecture


def get_architecture(model_type: Any) -> Architecture:
    """The entry for ``model_type``: registered, or from another package's entry point; InputError if there is none."""
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        for point in entry_points(group=ENTRY_POINTS, name=str(model_type)):
            found = point.load()
            if not isinstance(found, Architecture) or found.model_type != model_type:
                raise InputError(
                    f"found {point.value} as the entry point for {model_type!r}, expected an Architecture of that model_type: "
                    "mend the package that declares it"
                )
            return register_architecture(found)
        raise InputError(
            f"found model type {model_type!r}, expected one of {', '.join(ARCHITECTURES)}: "
            "describe yours by hf_kernel_ffn.register_architecture(Architecture(...))"
        )
    return ARCHITECTURES[model_type]


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The table's entry for ``model``; InputError if it is converted already, quantised or of no known family."""
    model_type = model.config.model_type
    if getattr(model.config, "kernel_ffn", None) is not None:
        raise InputError(
            f"found a model that is converted already ({model_type}), expected a stock one: convert its teacher instead"
        )
    architecture = get_architecture(model_type)
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None) is not None:
        raise InputError(f"found a quantised model ({model_type}), expected floating-point weights: load the model unquantised")
    for name, value in architecture.refuse:
        if getattr(model.config, name, None) == value:
            raise InputError(f"found {name}={value!r} in a {model_type}, expected another value: its FFN is not described then")
    return architecture


@dataclass(frozen=True)
class StockFFN:
    """One FFN of a teacher: calling it maps (..., hidden_size) to (..., hidden_size), without dropout on what it writes."""

    path: str
    """Under the base model, where the readout goes."""
    shape: Architecture
    """The table's entry, or the variant of it, that describes this FFN."""
    host: nn.Module
    """The module that holds its parts."""
    host_path: str
    number: int
    """Of its block among all blocks, which is how layers are counted."""
    expert: int | None = None

    @property
    def absorbed(self) -> tuple[str, ...]:
        """Paths of what the readout makes needless: activation and output projection of a split FFN, and its hidden dropout."""
        if not self.shape.split:
            return ()
        return tuple(
            join(self.host_path, name) for name in (self.shape.act, self.shape.down, self.shape.hidden_dropout) if name
        )

    @property
    def output_path(self) -> str:
        """Path of the module whose output is the FFN's."""
        return join(self.host_path, self.shape.down) if self.shape.split else self.host_path

    def norm(self, base: nn.Module) -> nn.Module | None:
        """Under the base model ``base``, the norm whose output is its input; None if the entry does not describe it."""
        if self.shape.ffn_norm is None:
            return None
        return base.get_submodule(join(self.host_path.removesuffix(self.shape.ffn).rstrip("."), self.shape.ffn_norm))

    def __call__(self, x: Tensor) -> Tensor:
        if self.expert is not None:  # forward(): a hook on the host may be what calls this
            flat = x.flatten(0, -2)
            chosen = torch.full((len(flat), 1), self.expert, device=x.device)
            return self.host.forward(flat, chosen, torch.ones_like(chosen, dtype=x.dtype)).view(x.shape)
        if not self.shape.split:
            return self.host(x)
        up, act, down = (attribute(self.host, str(name)) for name in (self.shape.up, self.shape.act, self.shape.down))
        return down(act(up(x)))


def stock_ffns(model: Any, architecture: Architecture) -> dict[str, StockFFN]:
    """Every FFN of a stock ``model`` that the entry describes, by path under the base model, in layer order.

    Raises:
        InputError: the model has none of the entry's stacks of blocks, or a block in which a part is missing; it is named.
    """
    found: dict[str, StockFFN] = {}
    for number, (path, block) in enumerate(_blocks(model.base_model, architecture)):
        missing = []
        for shape in architecture.shapes():
            missing.append(_missing(block, shape))
            if missing[-1] is None:
                host, host_path = attribute(block, shape.ffn), join(path, shape.ffn)
                found.update((ffn.path, ffn) for ffn in _ffns(shape, host, host_path, number))
                break
        else:
            raise InputError(
                f"found no {missing[0]!r} in {path} of a {type(model).__name__}, expected what the entry for "
                f"{architecture.model_type!r} describes: run hf-kernel-ffn families --explain on it"
            )
    return found


def stock_ffn(model: Any, path: str) -> StockFFN:
    """The FFN at ``path`` of a stock ``model``, or one that a converted model has left as it was."""
    architecture = get_architecture(family_name(model))
    for number, (block_path, block) in enumerate(_blocks(model.base_model, architecture)):
        for shape in architecture.shapes():
            host_path = join(block_path, shape.ffn)
            if path.startswith(host_path) and _missing(block, shape) is None:
                for ffn in _ffns(shape, attribute(block, shape.ffn), host_path, number):
                    if ffn.path == path:
                        return ffn
    raise InputError(f"found no FFN of a {architecture.model_type!r} at {path!r}: see hf-kernel-ffn families --explain")


def family_name(model: Any) -> str:
    """The stock model_type of a stock or converted ``model``."""
    entry = getattr(model.config, "kernel_ffn", None)
    return model.config.model_type if entry is None else entry["family"]


def ffn_paths(model: Any, architecture: Architecture) -> list[str]:
    """Path of every FFN under the base model of a stock or converted ``model``, in layer order."""
    converted = getattr(model.config, "kernel_ffn", None)
    if converted is None:
        return list(stock_ffns(model, architecture))
    paths: list[str] = []
    for path, block in _blocks(model.base_model, architecture):
        here = [name for name in model.config.kernel_ffn_layers() if name.startswith(f"{path}.")]
        for shape in () if here else architecture.shapes():
            if _missing(block, shape) is None:
                here = [ffn.path for ffn in _ffns(shape, attribute(block, shape.ffn), join(path, shape.ffn), 0)]
                break
        paths += here
    return paths


def _ffns(shape: Architecture, host: Any, host_path: str, number: int) -> Iterator[StockFFN]:
    if shape.experts:
        for expert in range(len(attribute(host, shape.down))):
            yield StockFFN(f"{host_path}.{expert}", shape, host, host_path, number, expert)
    else:
        yield StockFFN(join(host_path, shape.up) if shape.split else host_path, shape, host, host_path, number)


def _blocks(base: nn.Module, architecture: Architecture) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of every stack that is there, by path."""
    count = 0
    for path in stacks(base, architecture):
        for name, block in base.get_submodule(path).named_children():
            count += 1
            yield f"{path}.{name}", block
    if not count:
        raise InputError(
            f"found no blocks at {' or '.join(architecture.stacks)} in a {type(base).__name__}, expected those of a "
            f"{architecture.model_type!r}: run hf-kernel-ffn families --explain on it"
        )


def stacks(base: nn.Module, architecture: Architecture) -> list[str]:
    """Paths of the lists of blocks that ``base`` has."""
    return [path for stack in architecture.stacks for path in _expand(base, stack)]


def _expand(base: nn.Module, path: str) -> list[str]:
    """``path`` with * standing for every child, as far as it exists."""
    paths = [""]
    for name in path.split("."):
        step: list[str] = []
        for above in paths:
            children = [child for child, _ in base.get_submodule(above).named_children()]
            step += [join(above, child) for child in children if name in ("*", child)]
        paths = step
    return paths


def _missing(block: nn.Module, shape: Architecture) -> str | None:
    """The first part of ``shape`` that ``block`` lacks."""
    for name in (shape.ffn, *(join(shape.ffn, part) for part in (shape.up, shape.gate, shape.down, shape.act) if part)):
        try:
            part = attribute(block, name)
        except AttributeError:
            return name
        if isinstance(part, KernelExperts):
            return name
    return None


def join(*names: str) -> str:
    """Attribute names, or empty ones, as one path."""
    return ".".join(name for name in names if name)


def attribute(owner: Any, path: str) -> Any:
    """The attribute of ``owner`` at a dotted ``path``; AttributeError if there is none."""
    return reduce(getattr, path.split("."), owner) if path else owner


def parse_layers(layers: str, count: int) -> list[int]:
    """``"0-5,7"`` as a list of layer numbers; InputError if it is malformed or outside 0 … count − 1."""
    chosen: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise InputError(f"found layers {layers!r}, expected numbers and ranges such as 0-5,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            raise InputError(
                f"found layers {part.strip()!r}, expected numbers from 0 to {count - 1}: the model has {count} layers"
            )
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def choose_layers(layers: str, ffns: dict[str, StockFFN]) -> list[int]:
    """Layer numbers: ``"0-5,7"``, or those with an FFN whose path matches a pattern such as ``"text_model.*"``."""
    numbers = sorted({ffn.number for ffn in ffns.values()})
    if "*" not in layers:
        return parse_layers(layers, len(numbers))
    chosen = sorted({ffn.number for path, ffn in ffns.items() if fnmatchcase(path, layers)})
    if not chosen:
        raise InputError(
            f"found layers {layers!r}, expected a pattern that some FFN's path matches, such as {next(iter(ffns))}"
        )
    return chosen


WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class FFNWeights(NamedTuple):
    """A stock FFN in one orientation: ``y = Σ_i act(gate_i·x + …) (up_i·x + …) down_i + down_bias`` (gate None: act on up)."""

    up: Tensor
    """(intermediate_size, hidden_size)"""
    up_bias: Tensor | None
    gate: Tensor | None
    """(intermediate_size, hidden_size)"""
    gate_bias: Tensor | None
    down: Tensor
    """(intermediate_size, hidden_size): the columns of W_out as rows."""
    down_bias: Tensor | None
    activation: nn.Module

    def pre_activations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """up·x and gate·x (None without a gate), (..., intermediate_size) each."""
        up = nn.functional.linear(x, self.up, self.up_bias)
        return up, None if self.gate is None else nn.functional.linear(x, self.gate, self.gate_bias)

    def coefficients(self, x: Tensor) -> Tensor:
        """(..., intermediate_size): signed, what multiplies the columns of W_out."""
        up, gate = self.pre_activations(x)
        return self.activation(up) if gate is None else self.activation(gate) * up


def stock_weights(model: Any, ffn: StockFFN) -> FFNWeights:
    """The weights of ``ffn``, an FFN of ``model``; InputError as :func:`ffn_weights`."""
    return ffn_weights(ffn.host, ffn.shape, model.config, ffn.host_path, ffn.expert)


def ffn_weights(ffn: Any, architecture: Architecture, config, path: str, expert: int | None = None) -> FFNWeights:
    """The weights of the stock FFN whose parts are in the module ``ffn`` at ``path``.

    Raises:
        InputError: a part is missing, quantised, or holds NaN or infinite values; the tensor is named.
    """
    found: dict[str, Any] = {}
    for role in ("up", "gate", "down"):
        name = getattr(architecture, role)
        found[role] = (None, None) if name is None else _projection(ffn, name, path, expert)
    (up, up_bias), (gate, gate_bias), (down, down_bias) = found.values()
    if architecture.gate_half is not None:
        halves, biases = up.chunk(2), (None, None) if up_bias is None else up_bias.chunk(2)
        gate, gate_bias = halves[architecture.gate_half], biases[architecture.gate_half]
        up, up_bias = halves[1 - architecture.gate_half], biases[1 - architecture.gate_half]
    act = attribute(ffn, architecture.act) if architecture.act else ACT2FN[attribute(config, str(architecture.activation))]
    return FFNWeights(up, up_bias, gate, gate_bias, down.T, down_bias, act)


def finite(tensor: Tensor) -> bool:
    """Whether all its numbers are finite; without a mask of its size, which takes many times as long."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def _projection(ffn: Any, name: str, path: str, expert: int | None) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias."""
    try:
        module = attribute(ffn, name)
    except AttributeError:
        module = None
    if expert is None:
        good, tensors = isinstance(module, (nn.Linear, Conv1D)), dict(getattr(module, "_parameters", {}))
    else:
        good, tensors = isinstance(module, Tensor) and module.ndim == 3, {"weight": module}
    weight: Any = tensors.get("weight")
    if not good or weight.dtype not in WEIGHT_DTYPES:
        kind = "nothing" if module is None else f"{type(module).__name__} of {getattr(weight, 'dtype', '?')}"
        raise InputError(
            f"found {kind} at {path}.{name}, expected a floating-point Linear or Conv1D: load the model unquantised"
        )
    for part, tensor in tensors.items():
        if tensor is not None and not tensor.is_meta and not finite(tensor):
            raise InputError(
                f"found NaN or infinite values in {path}.{name}.{part}, expected finite weights: repair the teacher"
            )
    weight, bias = weight.detach(), tensors.get("bias")
    if expert is not None:
        weight = weight[expert]
    return weight.T if isinstance(module, Conv1D) else weight, None if bias is None else bias.detach()


def teacher_readout(weights: FFNWeights, hidden_states: Tensor) -> Readout:
    """The record of an untouched FFN: signed coefficients over the columns of W_out, no shares, no intensity."""
    return Readout(
        coefficients=weights.coefficients(hidden_states),
        dictionary=weights.down,
        bias=weights.down_bias,
        shares=None,
        intensity=None,
        names=tuple(str(i) for i in range(len(weights.down))),
    )
