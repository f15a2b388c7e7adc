"""Which of a student's readouts run by Triton kernels, and that a resumed run decides as before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..gpu.fused import Fused
from ..gpu.trial import choose_kernels
from ..storage.loading import get_torch_dtype
from .recipe import Recipe

if TYPE_CHECKING:
    from ..families.student import ConvertedModel


@dataclass(frozen=True)
class FusedReadouts:
    """What the trial of the kernels found."""

    served: list[str]
    """Paths of the FFNs that the kernels serve."""
    refused: dict[str, str]
    """Why an FFN on a GPU is left without them, by path."""

    def to_json(self) -> dict[str, object]:
        """What a state to resume from records."""
        return asdict(self)


def choose_fused_readouts(
    student: ConvertedModel, recipe: Recipe, before: Mapping[str, Any] | None = None
) -> FusedReadouts:
    """Let the Triton kernels serve the FFNs of ``student`` where ``recipe`` says so.

    Args:
        before: what was found when the run to resume was started. It is taken over: timing the
            kernels again might end otherwise, and with another arithmetic the resumed run's weights
            would not be those of an uninterrupted one.

    Raises:
        InputError: ``fused`` is always, and an FFN cannot be served (in its first call).
    """
    ffns = student.kernel_ffns()
    if before is not None and recipe.fused == "auto":
        verdict = FusedReadouts(list(before["served"]), dict(before["refused"]))
        for path, ffn in ffns.items():
            ffn.fused = Fused() if path in verdict.served else None
        return verdict

    autocast_dtype = None if recipe.dtype == "float32" else get_torch_dtype(recipe.dtype)
    refused = choose_kernels(student, recipe.fused, autocast_dtype)
    served = [path for path, ffn in ffns.items() if ffn.fused is not None]
    return FusedReadouts(served, refused)
