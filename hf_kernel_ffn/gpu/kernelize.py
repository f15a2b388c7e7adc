"""Triton kernels of readouts by the convention of the ``kernels`` package.

Its ``kernelize(model, mode=...)`` gives every layer for which a kernel is registered that kernel's
forward. Layers come from repositories of the hub as a rule; here they come from this package.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..checkpoint_code.errors import MissingPackage
from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.knot_readout import mix_knots
from ..checkpoint_code.tied import TiedKernelFFN
from .fused import fused_readout, reason_against_fused_readout, reason_against_fused_tied
from .tied_kernels import TRITON_STEP


class FusedTiedLayer(nn.Module):
    """The forward of a TiedKernelFFN by Triton kernels; its own where they cannot serve a call."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to (..., hidden_size); ``self`` is the TiedKernelFFN."""
        return forward_tied(self, hidden_states)  # type: ignore[arg-type]


class FusedDenseLayer(nn.Module):
    """The same for a KernelFFN: dense Yat readouts."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to (..., hidden_size); ``self`` is the KernelFFN."""
        return forward_dense(self, hidden_states)  # type: ignore[arg-type]


def forward_tied(ffn: TiedKernelFFN, hidden_states: Tensor) -> Tensor:
    """The output of ``ffn``, by Triton kernels if they can serve the call."""
    if reason_against_fused_tied(ffn, hidden_states) is not None:
        return type(ffn).forward(ffn, hidden_states)
    return ffn.dropout(mix_knots(ffn, hidden_states, TRITON_STEP))


def forward_dense(ffn: KernelFFN, hidden_states: Tensor) -> Tensor:
    """The output of ``ffn``, by Triton kernels if they can serve the call."""
    if reason_against_fused_readout(ffn, hidden_states) is not None:
        return type(ffn).forward(ffn, hidden_states)
    return ffn.dropout(fused_readout(ffn, hidden_states))


@dataclass(frozen=True)
class OwnLayer:
    """What the ``kernels`` package asks for a layer, instead of a repository of the hub."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        """The class whose forward replaces that of a readout."""
        return self.layer


LAYERS = {TiedKernelFFN: FusedTiedLayer, KernelFFN: FusedDenseLayer}
"""The layer of Triton kernels by the module that it serves."""


def register_kernel_layers(device: str = "cuda") -> None:
    """Let ``kernels.kernelize()`` find the Triton kernels of converted models.

    It concerns models made of this package's classes: by ``convert``, or ``load_student``. No hub
    is asked.

    Args:
        device: the type of device for which they are registered.

    Raises:
        MissingPackage: the ``kernels`` package is not installed.
    """
    try:
        from kernels import register_kernel_mapping, replace_kernel_forward_from_hub
    except ImportError as error:
        raise MissingPackage("kernelize needs the kernels package: pip install kernels") from error

    for module_class, layer in LAYERS.items():
        name = module_class.__name__
        replace_kernel_forward_from_hub(module_class, name)
        register_kernel_mapping({name: {device: OwnLayer(layer)}})
