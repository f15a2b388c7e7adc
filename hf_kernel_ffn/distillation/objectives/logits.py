"""logits: the divergence between the models' predictions."""

from __future__ import annotations

from torch import Tensor, nn

from ...checkpoint_code.parameters import to_at_least_float32
from ...text.inputs import make_forward_arguments
from ...text.prediction import logits_with_answers
from ..divergence import soften
from ..step import Step
from .registry import register_objective


@register_objective("logits")
def logits(step: Step) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T, and the cross-entropy on the text.

    Each has its weight in the stage, and is a mean over the predicted tokens, in nats: all of the
    text, or those under the masks where the batch has labels. Hinton et al. 2015
    (arXiv:1503.02531), §2.
    """
    stage = step.stage
    device = next(step.student.parameters()).device  # the teacher may be on another one
    # The teacher's class, since wrappers hide what the student's takes.
    arguments = make_forward_arguments(step.signal.teacher, step.batch, device)
    output = step.student(**arguments).logits

    softened = soften(output, stage.temperature)
    divergence = step.signal.divergence(step.batch, softened, stage.temperature)
    loss = divergence.mean() * stage.temperature**2 * stage.kl

    if stage.cross_entropy:
        predictions, answers = logits_with_answers(to_at_least_float32(output), step.batch)
        cross_entropy = nn.functional.cross_entropy(predictions.flatten(0, -2), answers.flatten())
        loss = loss + stage.cross_entropy * cross_entropy
    return loss
