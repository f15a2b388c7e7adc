"""From a teacher and a ``kernel_ffn`` entry to a student, and back."""

from __future__ import annotations

import copy as copying
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import __version__
from ..checkpoint_code.errors import InputError
from ..checkpoint_code.settings import FORMAT, LayerConfig
from .lookup import get_attribute_at
from .registry import get_architecture_of_model
from .task_classes import get_task_classes


def make_config_entry(teacher, layers: dict[str, LayerConfig]) -> dict:
    """What config.json says of a student of ``teacher`` with these FFNs."""
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


def make_student_from_entry(teacher: PreTrainedModel, entry: dict, copy: bool = False) -> Any:
    """A model of the family's own class with the FFNs that ``entry`` (of config.json) describes, zero until they are loaded,
    around the teacher's other parameters."""
    student = make_meta_student(teacher, entry)
    weight = next(teacher.parameters())
    for path in entry["layers"]:
        ffn = student.base_model.get_submodule(path).to(weight.dtype).to_empty(device=weight.device)
        for tensor in ffn.state_dict().values():
            tensor.zero_()
    _share_parameters(teacher, student, parameter_prefixes_of_converted_ffns(student, entry), copy)
    student.tie_weights()
    if teacher.can_generate():
        student.generation_config = copying.deepcopy(teacher.generation_config)
    return student.eval()


def make_meta_student(teacher: PreTrainedModel, entry: dict) -> Any:
    """The same without any weights, on the meta device."""
    student_class = _get_student_class(teacher, entry["family"])
    settings = {
        k: v
        for k, v in teacher.config.to_dict().items()
        if k not in ("model_type", "auto_map", "transformers_version")
    }
    config = student_class.config_class(**settings, kernel_ffn=entry)
    config._attn_implementation = teacher.config._attn_implementation
    config.name_or_path = teacher.config.name_or_path
    with torch.device("meta"):
        return student_class(config)


def share_equal_parameters(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Let ``student`` use the teacher's memory for every parameter outside its FFNs that is equal to the teacher's."""
    theirs = dict(teacher.named_parameters())
    within = parameter_prefixes_of_converted_ffns(student, student.config.kernel_ffn)
    for name, parameter in student.named_parameters():
        other = theirs.get(name)
        if not name.startswith(within) and other is not None and torch.equal(parameter, other):
            parameter.data = other.data


def parameter_prefixes_of_converted_ffns(student: PreTrainedModel, entry: dict) -> tuple[str, ...]:
    """What the names of all parameters of converted FFNs start with."""
    paths = [
        path
        for layer in entry["layers"]
        for path in (layer, *entry["layers"][layer].get("absorbed", ()))
    ]
    paths += [
        path.rpartition(".")[0] for path, layer in entry["layers"].items() if layer.get("experts")
    ]
    return tuple(f"{get_name_prefix(student)}{path}." for path in paths)


def get_name_prefix(model: PreTrainedModel) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _get_student_class(teacher, family: str) -> Any:
    name = f"Kernel{type(teacher).__name__}"
    module = get_task_classes(family, teacher)
    if not hasattr(module, name):
        heads = ", ".join(
            n.removeprefix("Kernel")
            for n in vars(module)
            if n.startswith("Kernel") and "Mixin" not in n and "Config" not in n
        )
        raise InputError(
            f"found a {type(teacher).__name__}, expected one of {heads}: load the teacher by one of these classes"
        )
    return getattr(module, name)


def _share_parameters(
    source: nn.Module, target: nn.Module, skip: tuple[str, ...], copy: bool
) -> None:
    """Give ``target`` the parameters and buffers of ``source``, ties kept, without those whose name starts with one of ``skip``."""
    made: dict[int, Tensor] = {}
    for kind, named in (
        ("_parameters", source.named_parameters),
        ("_buffers", source.named_buffers),
    ):
        for name, tensor in named(remove_duplicate=False):
            if name.startswith(skip):
                continue
            if id(tensor) not in made:
                data = tensor.detach().clone() if copy else tensor.detach()
                made[id(tensor)] = (
                    nn.Parameter(data, requires_grad=tensor.requires_grad)
                    if kind == "_parameters"
                    else data
                )
            parent, _, leaf = name.rpartition(".")
            getattr(target.get_submodule(parent), kind)[leaf] = made[id(tensor)]


def restore(student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    """A stock model again: ``student`` with the FFNs of ``teacher``, sharing the memory of both.

    Raises:
        InputError: ``student`` is not converted, or the two are not of one shape.
    """
    entry = getattr(student.config, "kernel_ffn", None)
    if entry is None:
        raise InputError(
            "found a student that is not converted, expected one with a kernel_ffn entry: nothing to restore"
        )
    if teacher.config.model_type != entry["family"]:
        raise InputError(
            f"found a teacher of type {teacher.config.model_type!r}, expected {entry['family']!r}: give the student's own"
        )
    within = parameter_prefixes_of_converted_ffns(student, entry)
    mine = {n: p.shape for n, p in student.named_parameters() if not n.startswith(within)}
    other = {n: p.shape for n, p in teacher.named_parameters() if not n.startswith(within)}
    if mine != other:
        raise InputError(
            "found a teacher whose parameters differ in name or shape from the student's: give the student's own teacher"
        )
    with torch.device("meta"):
        stock = type(teacher)(teacher.config)
    _share_parameters(teacher, stock, (), copy=False)
    _share_parameters(student, stock, within, copy=False)
    stock.tie_weights()
    if teacher.can_generate():
        stock.generation_config = copying.deepcopy(student.generation_config)
    return stock.eval()


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """InputError unless ``student`` is converted and ``teacher`` is a stock model of its family, vocabulary and shape."""
    entry = getattr(student.config, "kernel_ffn", None)
    if entry is None:
        raise InputError(
            "found a student that is not converted, expected one with a kernel_ffn entry: run hf-kernel-ffn convert"
        )
    if (
        getattr(teacher.config, "kernel_ffn", None) is not None
        or teacher.config.model_type != entry["family"]
    ):
        raise InputError(
            f"found a teacher of type {teacher.config.model_type!r}, expected a stock {entry['family']!r}: give the student's own"
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        mine, other = getattr(student.config, name, None), getattr(teacher.config, name, None)
        if mine != other:
            raise InputError(
                f"found {name} {mine} in the student and {other} in the teacher, expected equal: give the student's own teacher"
            )
