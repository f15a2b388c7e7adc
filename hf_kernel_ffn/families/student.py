"""From a teacher and a ``kernel_ffn`` entry to a student, and back."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import __version__
from ..checkpoint_code.errors import InputError
from ..checkpoint_code.layer_config import FORMAT, LayerConfig
from ..compat import get_attention_implementation, set_attention_implementation
from .lookup import get_attribute_at
from .registry import get_architecture_of_model
from .task_classes import get_task_classes

if TYPE_CHECKING:
    from ..checkpoint_code.modeling import KernelModelMixin

    class ConvertedModel(KernelModelMixin, PreTrainedModel):  # type: ignore[misc]
        """What a type checker knows of a converted model: it is a stock one with the mixin."""

        config_class: type[Any]
        to: Any  # transformers' wrapper around it hides what it takes


NOT_OF_THE_STUDENT = ("model_type", "auto_map", "transformers_version")
"""Attributes of the teacher's config that its student has values of its own for."""


def make_config_entry(
    teacher: PreTrainedModel, layers: Mapping[str, LayerConfig]
) -> dict[str, Any]:
    """Return what config.json says of a student of ``teacher``.

    Args:
        layers: the FFNs that are converted, by path under the base model.
    """
    architecture = get_architecture_of_model(teacher)
    return {
        "format": FORMAT,
        "package_version": __version__,
        "family": architecture.model_type,
        "teacher_class": type(teacher).__name__,
        "activation": {
            name: get_attribute_at(teacher.config, name) for name in architecture.guards
        },
        "layers": {path: layer.to_dict() for path, layer in layers.items()},
    }


def make_student_from_entry(
    teacher: PreTrainedModel, entry: dict[str, Any], copy: bool = False
) -> ConvertedModel:
    """Make a model of the family's own class around the teacher's other parameters.

    Args:
        entry: of config.json. The FFNs that it describes are zero until they are loaded.
        copy: own copies of the teacher's parameters, instead of sharing their memory.

    Returns:
        the student, in eval mode.
    """
    student = make_meta_student(teacher, entry)
    weight = next(teacher.parameters())
    for path in entry["layers"]:
        ffn = student.base_model.get_submodule(path)
        ffn.to(weight.dtype).to_empty(device=weight.device)
        for tensor in ffn.state_dict().values():
            tensor.zero_()

    converted = parameter_prefixes_of_converted_ffns(student, entry)
    _share_parameters(teacher, student, skip=converted, copy=copy)
    student.tie_weights()

    if teacher.can_generate():
        student.generation_config = copying.deepcopy(teacher.generation_config)
    return student.eval()


def make_meta_student(teacher: PreTrainedModel, entry: dict[str, Any]) -> ConvertedModel:
    """Make the student that ``entry`` describes without any weights, on the meta device."""
    student_class = _get_student_class(teacher, entry["family"])
    settings = {
        name: value
        for name, value in teacher.config.to_dict().items()
        if name not in NOT_OF_THE_STUDENT
    }
    config = student_class.config_class(**settings, kernel_ffn=entry)
    set_attention_implementation(config, get_attention_implementation(teacher.config))
    config.name_or_path = teacher.config.name_or_path
    with torch.device("meta"):
        return student_class(config)


def share_equal_parameters(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Let ``student`` use the teacher's memory for its equal parameters outside the FFNs."""
    teacher_parameters = dict(teacher.named_parameters())
    converted = parameter_prefixes_of_converted_ffns(student, get_config_entry(student))
    for name, parameter in student.named_parameters():
        original = teacher_parameters.get(name)
        if name.startswith(converted) or original is None:
            continue
        if torch.equal(parameter, original):
            parameter.data = original.data


def parameter_prefixes_of_converted_ffns(
    student: PreTrainedModel, entry: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return what the names of all parameters of converted FFNs start with.

    Those of a teacher's FFNs that ``entry`` converts start with the same.
    """
    layers: Mapping[str, Mapping[str, Any]] = entry["layers"]
    paths: list[str] = []
    for path, layer in layers.items():
        paths.append(path)
        paths += layer.get("absorbed", ())
        if layer.get("experts"):  # the teacher's are stacked in tensors of the module above
            paths.append(path.rpartition(".")[0])
    return tuple(f"{get_name_prefix(student)}{path}." for path in paths)


def get_name_prefix(model: PreTrainedModel) -> str:
    """Return what stands before names under the base model in the names under ``model``."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def restore(student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    """Make a stock model again: ``student`` with the FFNs of ``teacher``.

    Returns:
        a model that shares the memory of both, in eval mode.

    Raises:
        InputError: ``student`` is not converted, or the two are not of one shape.
    """
    if getattr(student.config, "kernel_ffn", None) is None:
        raise InputError(
            "found a student that is not converted, expected one with a kernel_ffn entry: "
            "nothing to restore"
        )
    entry = get_config_entry(student)
    if teacher.config.model_type != entry["family"]:
        raise InputError(
            f"found a teacher of type {teacher.config.model_type!r}, "
            f"expected {entry['family']!r}: give the student's own"
        )

    converted = parameter_prefixes_of_converted_ffns(student, entry)
    if _list_other_shapes(student, converted) != _list_other_shapes(teacher, converted):
        raise InputError(
            "found a teacher whose parameters differ in name or shape from the student's: "
            "give the student's own teacher"
        )

    with torch.device("meta"):
        stock = type(teacher)(teacher.config)
    _share_parameters(teacher, stock, skip=(), copy=False)
    _share_parameters(student, stock, skip=converted, copy=False)
    stock.tie_weights()

    if teacher.can_generate():
        stock.generation_config = copying.deepcopy(student.generation_config)
    return stock.eval()


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Check that ``teacher`` may be the one that ``student`` was made from.

    Raises:
        InputError: ``student`` is not converted, or ``teacher`` is no stock model of its family,
            vocabulary and shape.
    """
    if getattr(student.config, "kernel_ffn", None) is None:
        raise InputError(
            "found a student that is not converted, expected one with a kernel_ffn entry: "
            "run hf-kernel-ffn convert"
        )
    family = get_config_entry(student)["family"]
    is_stock = getattr(teacher.config, "kernel_ffn", None) is None
    if not is_stock or teacher.config.model_type != family:
        raise InputError(
            f"found a teacher of type {teacher.config.model_type!r}, "
            f"expected a stock {family!r}: give the student's own"
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        of_student = getattr(student.config, name, None)
        of_teacher = getattr(teacher.config, name, None)
        if of_student != of_teacher:
            raise InputError(
                f"found {name} {of_student} in the student and {of_teacher} in the teacher, "
                "expected equal: give the student's own teacher"
            )


def get_config_entry(student: PreTrainedModel) -> dict[str, Any]:
    """Return the ``kernel_ffn`` entry in the config of a converted model."""
    return get_attribute_at(student.config, "kernel_ffn")


def _get_student_class(teacher: PreTrainedModel, family: str) -> type[ConvertedModel]:
    """Return the converted class that belongs to the teacher's; InputError if there is none."""
    module = get_task_classes(family, teacher)
    name = f"Kernel{type(teacher).__name__}"
    if not hasattr(module, name):
        heads = ", ".join(
            other.removeprefix("Kernel")
            for other in vars(module)
            if other.startswith("Kernel") and "Mixin" not in other and "Config" not in other
        )
        raise InputError(
            f"found a {type(teacher).__name__}, expected one of {heads}: "
            "load the teacher by one of these classes"
        )
    return getattr(module, name)


def _list_other_shapes(model: PreTrainedModel, converted: tuple[str, ...]) -> dict[str, torch.Size]:
    """Return the shape by name of every parameter whose name starts with none of ``converted``."""
    return {
        name: parameter.shape
        for name, parameter in model.named_parameters()
        if not name.startswith(converted)
    }


def _share_parameters(
    source: nn.Module, target: nn.Module, *, skip: tuple[str, ...], copy: bool
) -> None:
    """Give ``target`` the parameters and buffers of ``source``, ties kept.

    Args:
        skip: what the names of those start with that are left out.
        copy: own copies instead.
    """
    shared: dict[int, Tensor] = {}

    def share(named: Iterable[tuple[str, Tensor]], kind: str) -> None:
        for name, tensor in named:
            if name.startswith(skip):
                continue
            if id(tensor) not in shared:
                data = tensor.detach().clone() if copy else tensor.detach()
                if kind == "_parameters":
                    data = nn.Parameter(data, requires_grad=tensor.requires_grad)
                shared[id(tensor)] = data
            path, _, leaf = name.rpartition(".")
            getattr(target.get_submodule(path), kind)[leaf] = shared[id(tensor)]

    share(source.named_parameters(remove_duplicate=False), "_parameters")
    share(source.named_buffers(remove_duplicate=False), "_buffers")
