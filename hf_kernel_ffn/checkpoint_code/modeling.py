"""What a family's task classes add to the stock ones: kernel-readout FFNs in place of the teacher's.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

import functools
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import InputError
from .experts import KernelExperts
from .integrity import check_folder, check_model, record_checksums
from .tied import make_ffn


class KernelModelMixin:
    """Put before a stock class: swaps the FFNs that the config names, and refuses a load that would leave one random."""

    config: Any
    base_model: Any
    _auto_class = None  # of a stock class that came with code of its own: the config saves the code

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.forward = _with_readouts(cls.forward)

    def post_init(self):
        layers = self.config.kernel_ffn_layers()
        if not layers:
            raise InputError(
                f"{type(self).__name__} needs a config with a kernel_ffn entry: make one by hf_kernel_ffn.convert()"
            )
        for path, layer in layers.items():
            try:
                install_ffn(self.base_model, path, make_ffn(layer))
            except AttributeError:
                raise InputError(
                    f"found no module {path!r} in {type(self).__name__}: the kernel_ffn entry is of another model"
                ) from None
        super().post_init()

    def kernel_ffns(self) -> dict:
        """The converted FFNs by their path under the base model, in layer order."""
        return {
            path: self.base_model.get_submodule(path) for path in self.config.kernel_ffn_layers()
        }

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs
    ):
        """As the stock method; InputError if a tensor of a converted FFN is missing from the checkpoint or has
        another shape, since the stock method would only warn and leave it random."""
        tensors = check_folder(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
        if tensors is not None:
            config = kwargs.get("config") or cls.config_class.from_pretrained(
                pretrained_model_name_or_path, subfolder=kwargs.get("subfolder", "")
            )
            with torch.device("meta"):
                check_model(cls(config), tensors, pretrained_model_name_or_path)
        kwargs["use_safetensors"] = True  # the other format runs code when it is read
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        paths = tuple(f"{path}." for path in model.config.kernel_ffn_layers())
        body = () if model.base_model is model else (f"{model.base_model_prefix}.",)
        lost = sorted(
            key  # a head may be new; what is under it may not
            for found in (info["missing_keys"], [entry[0] for entry in info["mismatched_keys"]])
            for key in found
            if not body or key.startswith((*body, *paths))
        )
        if lost:
            raise InputError(
                f"found {len(lost)} tensors missing or misshapen in {pretrained_model_name_or_path}, "
                f"the first {lost[0]!r}: the checkpoint is incomplete; copy or convert it again"
            )
        extra = sorted(
            key
            for key in info["unexpected_keys"]
            if key.startswith(body) or any(f".{path}" in f".{key}" for path in paths)
        )
        if extra:
            raise InputError(
                f"found {len(extra)} tensors too many in {pretrained_model_name_or_path}, the first {extra[0]!r}: the weights are "
                "of another model than config.json; copy or convert it again"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As the stock method; also writes the checksums that ``hf-kernel-ffn verify`` checks."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            record_checksums(save_directory)


def install_ffn(base, path, ffn) -> list:
    """Put ``ffn`` at ``path`` under ``base``, and what passes its output on where the teacher's FFN was no module of its own.

    Returns:
        (owner, name, what it was) of every attribute changed, in order; AttributeError if there is nothing at the path.
    """
    changed = []

    def put(path, make):
        parent, _, name = path.rpartition(".")
        owner = base.get_submodule(parent)
        before = getattr(owner, name)
        changed.append((owner, name, before))
        setattr(owner, name, make(before))

    parent, _, number = path.rpartition(".")
    if ffn.config.experts:
        if not isinstance(base.get_submodule(parent), KernelExperts):
            put(parent, lambda before: KernelExperts())
        base.get_submodule(parent).add_module(number, ffn)
    else:
        base.get_submodule(
            path
        )  # AttributeError if that is no module: config.json may name anything
        put(path, lambda before: ffn)
    for other in ffn.config.absorbed:
        put(other, lambda before: nn.Identity() if isinstance(before, nn.Module) else 0.0)
    return changed


@contextmanager
def recorded_readouts(model):
    """Collect the record of every converted FFN, in the order in which they run, while the context is open."""
    records = []
    hooks = [
        ffn.register_forward_hook(
            lambda module, args, output: records.append(module.readout(args[0]))
        )
        for ffn in model.kernel_ffns().values()
    ]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def _with_readouts(forward):
    """``forward`` with one more argument, ``output_readouts``: whether the output gets ``readouts``, a tuple with one
    record per converted layer. Its signature stays the stock one, which generation and trainers inspect."""
    if getattr(forward, "_gives_readouts", False):
        return forward

    @functools.wraps(forward)
    def wrapped(self, *args, output_readouts=False, **kwargs):
        if not output_readouts:
            return forward(self, *args, **kwargs)
        with recorded_readouts(self) as records:
            output = forward(self, *args, **kwargs)
        if isinstance(output, tuple):
            return (*output, tuple(records))
        output["readouts"] = tuple(records)
        return output

    wrapped._gives_readouts = True
    return wrapped
