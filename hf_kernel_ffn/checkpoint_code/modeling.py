"""What a family's task classes add to the stock ones: kernel readouts in place of its FFNs.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .experts import KernelExperts
from .integrity import (
    check_folder,
    check_model,
    record_checksums,
    set_aside_weights,
    share_mode,
)
from .parallel_plan import fit_plans
from .parameters import ConstrainedParameters
from .record import Readout
from .tied import AnyKernelFFN, make_ffn

if TYPE_CHECKING:  # it is put before a stock model class
    from transformers import PreTrainedModel as _StockModel
else:
    _StockModel = object

SAVE_ARGUMENTS = ("is_main_process", "state_dict", "push_to_hub", "max_shard_size", "variant")
"""Arguments of ``save_pretrained`` after the folder, in order."""
UPLOAD_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "create_pr")
"""Arguments of ``save_pretrained`` that say how its result is pushed, and nothing else."""
HUB_OPTIONS = (*UPLOAD_OPTIONS, "token", "revision", "max_shard_size")
"""Those that ``push_to_hub`` takes."""

Change = tuple[nn.Module, str, Any]
"""(owner, name, what it was) of one attribute that was changed."""


class KernelModelMixin(_StockModel):
    """Put before a stock class: swaps the FFNs that the config names.

    It refuses a load that would leave one of them random.
    """

    config: Any
    config_class: Any
    base_model: Any
    _auto_class = None  # a stock class that came with code of its own may set it: the config saves

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.forward = _add_readouts_argument(cls.forward)

    def post_init(self) -> None:
        """As the stock method, once the kernel readouts are in place."""
        layers = self.config.kernel_ffn_layers()
        if not layers:
            raise InputError(
                f"{type(self).__name__} needs a config with a kernel_ffn entry: "
                "make one by hf_kernel_ffn.convert()"
            )
        for path, layer in layers.items():
            try:
                install_ffn(self.base_model, path, make_ffn(layer))
            except AttributeError:
                raise InputError(
                    f"found no module {path!r} in {type(self).__name__}: "
                    "the kernel_ffn entry is of another model"
                ) from None
        super().post_init()
        fit_plans(self)

    def kernel_ffns(self) -> dict[str, AnyKernelFFN]:
        """The converted FFNs by their path under the base model, in layer order."""
        return {
            path: self.base_model.get_submodule(path) for path in self.config.kernel_ffn_layers()
        }

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As the stock method, which would only warn of a missing tensor and leave it random.

        Raises:
            InputError: a tensor of the checkpoint is missing, has another shape than its config
                says, or is one too many.
        """
        name = pretrained_model_name_or_path
        subfolder = kwargs.get("subfolder", "")
        tensors = check_folder(name, subfolder)
        if tensors is not None:
            config = kwargs.get("config") or cls.config_class.from_pretrained(
                name, subfolder=subfolder
            )
            with torch.device("meta"):
                check_model(cls(config), tensors, name)

        kwargs["use_safetensors"] = True  # the other format runs code when it is read
        loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        _require_all_loaded(model, info, name)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As the stock method; also writes the checksums that ``hf-kernel-ffn verify`` checks.

        The tensors keep the model's own names, also where transformers has other ones for the
        files of a stock model. What a save before left is gone, whether it was in one file or in
        several. What is pushed has its checksums too.

        Raises:
            InputError: ``save_directory`` is a file.
        """
        if os.path.isfile(save_directory):
            raise InputError(f"found the file {save_directory}, expected a folder to save in")
        kwargs.update(zip(SAVE_ARGUMENTS, args, strict=False))
        push_to_hub = kwargs.pop("push_to_hub", False)
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        kwargs = {name: value for name, value in kwargs.items() if name not in UPLOAD_OPTIONS}
        kwargs["save_original_format"] = False
        is_main_process = kwargs.get("is_main_process", True)
        is_whole = kwargs.get("variant") is None and not getattr(
            self, "_hf_peft_config_loaded", False
        )
        replaces = is_main_process and is_whole  # not another variant, nor an adapter, beside it

        with set_aside_weights(save_directory) if replaces else nullcontext():
            super().save_pretrained(save_directory, **kwargs)
            if replaces:
                share_mode(save_directory)
        if is_main_process:
            record_checksums(save_directory)
        if is_main_process and push_to_hub:
            name = os.path.basename(os.path.abspath(save_directory))
            self.push_to_hub(hub_options.pop("repo_id", name), **hub_options)


def _require_all_loaded(model: Any, info: dict[str, Any], name: object) -> None:
    """InputError if ``info`` of a load names tensors of the body that are missing or too many.

    A head may be new; what is under it may not.
    """
    ffn_prefixes = tuple(f"{path}." for path in model.config.kernel_ffn_layers())
    is_bare = model.base_model is model
    body = () if is_bare else (f"{model.base_model_prefix}.",)

    missing = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    lost = sorted(key for key in missing if is_bare or key.startswith((*body, *ffn_prefixes)))
    if lost:
        raise InputError(
            f"found {len(lost)} tensors missing or misshapen in {name}, the first {lost[0]!r}: "
            "the checkpoint is incomplete; copy or convert it again"
        )

    extra = sorted(
        key
        for key in info["unexpected_keys"]
        if key.startswith(body) or any(f".{prefix}" in f".{key}" for prefix in ffn_prefixes)
    )
    if extra:
        raise InputError(
            f"found {len(extra)} tensors too many in {name}, the first {extra[0]!r}: "
            "the weights are of another model than config.json; copy or convert it again"
        )


def install_ffn(base: nn.Module, path: str, ffn: ConstrainedParameters) -> list[Change]:
    """Put ``ffn`` at ``path`` under ``base``.

    Where the teacher's FFN was no module of its own, what stood around it now passes on the
    output of ``ffn`` as it is.

    Returns:
        every attribute that was changed, in order.

    Raises:
        AttributeError: there is nothing, or no module, at the path.
    """
    changes: list[Change] = []

    def replace(path: str, make: Callable[[Any], object]) -> None:
        parent, _, name = path.rpartition(".")
        owner = base.get_submodule(parent)
        before = getattr(owner, name)
        changes.append((owner, name, before))
        setattr(owner, name, make(before))

    if ffn.config.experts:
        parent, _, number = path.rpartition(".")
        if not isinstance(base.get_submodule(parent), KernelExperts):
            replace(parent, lambda before: KernelExperts())
        base.get_submodule(parent).add_module(number, ffn)
    else:
        base.get_submodule(path)  # AttributeError if that is no module: config.json may name any
        replace(path, lambda before: ffn)
    for absorbed in ffn.config.absorbed:
        replace(absorbed, _make_needless)
    return changes


def _make_needless(before: object) -> object:
    """What stands for an absorbed attribute: the identity for a module, zero for a number."""
    return nn.Identity() if isinstance(before, nn.Module) else 0.0


@contextmanager
def recorded_readouts(model: Any) -> Iterator[list[Readout]]:
    """Collect the record of every converted FFN of ``model`` while the context is open.

    The records stand in the order in which the FFNs run.
    """
    records: list[Readout] = []

    def record(ffn: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        records.append(ffn.readout(args[0]))

    hooks = [ffn.register_forward_hook(record) for ffn in model.kernel_ffns().values()]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def _add_readouts_argument(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` with one more argument, ``output_readouts``.

    If it is set, the output gets ``readouts``, a tuple with the record of every run of a
    converted FFN. The signature stays the stock one, which generation and trainers inspect.
    """
    if getattr(forward, "_gives_readouts", False):
        return forward

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, output_readouts: bool = False, **kwargs: Any) -> Any:
        if not output_readouts:
            return forward(self, *args, **kwargs)
        with recorded_readouts(self) as records:
            output = forward(self, *args, **kwargs)
        if isinstance(output, tuple):
            return (*output, tuple(records))
        output["readouts"] = tuple(records)
        return output

    setattr(wrapped, "_gives_readouts", True)  # noqa: B010  (no attribute of a function's type)
    return wrapped
