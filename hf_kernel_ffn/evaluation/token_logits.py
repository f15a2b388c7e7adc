"""Logits of a language model a few tokens at a time, so that a large vocabulary fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..checkpoint_code.errors import InputError
from ..text.inputs import Inputs, make_forward_arguments
from ..text.prediction import logits_with_answers

LOGIT_BYTES = 2**28
"""Bytes that all float32 matrices of (tokens, vocabulary) may take together."""
MATRICES = 4
"""How many of them there are at once when the predictions of two models are compared."""
PROBE_TOKENS = 16
"""Tokens on which a way to make logits is tried: few, since all their logits are held twice."""
PROBE_TOLERANCE = 1e-4
"""How far, relative to the largest, those logits may be from the model's own: rounding, no more."""

Head = Callable[[ModelOutput, Tensor], Tensor]
"""Logits (tokens, vocabulary) from what the base model returned and some of its last states."""


@dataclass
class Predictions:
    """What a model predicts at the tokens of a batch whose answer is known."""

    answers: Tensor
    """(tokens,) token ids."""
    states: Tensor
    """(tokens, hidden_size) the base model's last states there; or the logits themselves."""
    head: Callable[[Tensor], Tensor]
    """Makes logits of some rows of ``states``."""

    def log_probabilities(self, tokens: slice) -> Tensor:
        """(…, vocabulary) float32, at some of the tokens."""
        return self.head(self.states[tokens]).float().log_softmax(-1)


class TokenLogits:
    """The logits of ``model``, of which only a few tokens' are held at a time.

    The base model reads a batch at once. What follows it (a linear head, and whatever else scales,
    caps or transforms) is applied to a few tokens' states when their logits are asked for: by the
    model's own code or, if that does not go through ``base_model``, by the output embeddings. Both
    are tried on the first tokens of ``inputs``; a model that gives other logits either way makes
    those of a whole batch at once.

    Raises:
        InputError: ``model`` makes no logits.
    """

    def __init__(self, model: PreTrainedModel, inputs: Inputs):
        if model.get_output_embeddings() is None:
            raise InputError(
                f"found a {type(model).__name__}, which predicts no tokens, expected a language "
                "model: load it with its head"
            )
        self.model = model
        self.vocabulary = model.config.get_text_config().vocab_size
        self._head = self._find_head(inputs)

    def predict(self, inputs: Inputs) -> Predictions:
        """Run the model over a batch."""
        head = self._head
        if head is None:
            logits, answers = logits_with_answers(_run(self.model, inputs)["logits"], inputs)
            return Predictions(answers.flatten(), logits.flatten(0, -2), head=_keep)

        output = _run(self.model.base_model, inputs)
        states, answers = logits_with_answers(output["last_hidden_state"], inputs)
        states = states.flatten(0, -2)
        return Predictions(answers.flatten(), states, head=lambda rows: head(output, rows))

    def split(self, predictions: Predictions) -> Iterator[slice]:
        """The tokens of a batch in chunks whose logits take no more than LOGIT_BYTES."""
        size = max(1, LOGIT_BYTES // (MATRICES * 4 * self.vocabulary))
        for first in range(0, len(predictions.answers), size):
            yield slice(first, first + size)

    def _find_head(self, inputs: Inputs) -> Head | None:
        """The first way to make logits of states that gives the model's own; None if none does.

        A model that is its own base model, as T5 is, has no states apart from its logits.
        """
        if self.model.base_model is self.model:
            return None
        few = _take_first_tokens(inputs)
        whole = _run(self.model, few)["logits"].flatten(0, -2)
        output = _run(self.model.base_model, few)
        states = output["last_hidden_state"].flatten(0, -2)
        tolerance = max(PROBE_TOLERANCE, 2 * torch.finfo(whole.dtype).eps) * whole.abs().max()

        for head in (self._apply_rest, self._apply_output_embeddings):
            try:
                halves = [head(output, part) for part in states.tensor_split(2)]
                error = (torch.cat(halves) - whole).abs().max()
            except Exception:  # whatever the code of a model raises when it is called otherwise
                continue
            if error <= tolerance:
                return head
        return None

    def _apply_output_embeddings(self, output: ModelOutput, states: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(states)

    def _apply_rest(self, output: ModelOutput, states: Tensor) -> Tensor:
        """Run the model as if its base model had come to ``states``."""
        stand_in = type(output)(**{**output, "last_hidden_state": states[None]})
        ids = torch.zeros(1, len(states), dtype=torch.long)  # which nothing reads
        with _replace_forward(self.model.base_model, stand_in):
            return _run(self.model, ids)["logits"][0]


def _run(model: nn.Module, inputs: Inputs) -> ModelOutput:
    return model(**make_forward_arguments(model, inputs))


def _keep(logits: Tensor) -> Tensor:
    return logits


def _take_first_tokens(inputs: Inputs) -> Inputs:
    """The first PROBE_TOKENS of the first row."""
    if isinstance(inputs, Tensor):
        return inputs[:1, :PROBE_TOKENS]
    return {name: tensor[:1, :PROBE_TOKENS] for name, tensor in inputs.items()}


@contextmanager
def _replace_forward(module: nn.Module, output: ModelOutput) -> Iterator[None]:
    """While the context is open, ``module`` returns ``output`` whatever it is called with."""
    before = vars(module).get("forward")  # another library's wrapper may be there
    vars(module)["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before
