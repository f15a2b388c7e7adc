"""How many units a sparse map keeps in each layer, by what leaving one out costs.

A unit writes c_i v_i. To second order, leaving it out costs the predictions E[(g·c_i v_i)²] / 2
nats, with g the gradient of the log-probability of a token that the model itself would draw: the
Fisher information. Taken apart as c_i² v_iᵀ F v_i, F = E[g gᵀ] of the layer, it is one number for
every unit and token. The units that are dearest over all layers are counted where they stand. So
the counts of a few layers rise, those of others fall, and their mean stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.settings import KernelFFNConfig
from ..families.hooks import watch_ffn_input
from ..families.lookup import StockFFN
from ..families.weights import read_stock_weights
from ..progress import track_progress
from ..text.inputs import Inputs, count_rows, make_forward_arguments, select_rows, tokens_per_row

ALLOCATION_TOKENS = 4096
"""Of the calibration set that are read: each goes backward through the whole model."""
ROWS_AT_ONCE = 2
"""Rows that go backward together."""
KEPT_TOKENS = 512
"""Tokens whose costs are compared."""


class LayerCosts:
    """What the units of one FFN cost, gathered batch by batch."""

    def __init__(self, model: PreTrainedModel, ffn: StockFFN):
        """Begin for ``ffn``, an FFN of ``model``, with no tokens."""
        self.weights = read_stock_weights(model, ffn)
        size = self.weights.down.shape[1]
        self.fisher = torch.zeros(size, size, device=self.weights.down.device)
        self.squares: list[Tensor] = []
        """(tokens, units) c² of some tokens."""
        self.output = torch.empty(0)
        """Of the batch that is being read."""

    def add_gradient(self) -> None:
        """Add g gᵀ of the batch that has gone backward; positions that nothing reads have none."""
        assert self.output.grad is not None
        gradient = self.output.grad.flatten(0, -2).float()
        self.fisher += gradient.T @ gradient

    def compute(self) -> Tensor:
        """(tokens, units) c_i² v_iᵀ F v_i, but for a factor that all layers share."""
        down = self.weights.down.float()
        price = ((down @ self.fisher) * down).sum(-1)
        return torch.cat(self.squares) * price


def allocate_top_k(
    teacher: PreTrainedModel,
    ffns: Mapping[str, StockFFN],
    settings: Mapping[str, KernelFFNConfig],
    inputs: Inputs,
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, KernelFFNConfig]:
    """The ``settings`` of each of ``ffns`` by path, their ``top_k`` shared out by cost.

    The sum of all ``top_k`` stays as it is. The gradient of a whole model is needed: it has to fit
    in memory with all activations of :data:`ROWS_AT_ONCE` rows.

    Args:
        inputs: (rows, …) of the calibration set.
        seed: of the tokens that the teacher draws.

    Raises:
        InputError: as :func:`require_allocatable`.
    """
    require_allocatable(teacher, ffns, settings)
    parameters = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        costs = _measure(teacher, ffns, inputs, seed, progress)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)

    wanted = sum(each.top_k or 0 for each in settings.values())
    counts = _count_dearest([layer.compute() for layer in costs.values()], wanted)
    return {
        path: replace(settings[path], top_k=count)
        for path, count in zip(costs, counts, strict=True)
    }


def require_allocatable(
    teacher: PreTrainedModel,
    ffns: Mapping[str, StockFFN],
    settings: Mapping[str, KernelFFNConfig],
) -> None:
    """Check that the counts of ``ffns`` can be shared out.

    Raises:
        InputError: a layer is not sparse, is an expert of a mixture, or serves several layers; or
            the teacher has no logits.
    """
    for path, ffn in ffns.items():
        if not settings[path].sparse:
            raise InputError(
                f"found allocate with simplex {settings[path].simplex!r}, expected 'threshold' or "
                "'top-k': only these keep a number of units; leave allocate out"
            )
        if ffn.expert is not None or ffn.shape.shared:
            raise InputError(
                f"found allocate with {path}, an expert or an FFN of several layers, expected one "
                "FFN for each layer: leave allocate out"
            )
    if teacher.get_output_embeddings() is None:
        raise InputError(
            f"found allocate with a {type(teacher).__name__}, expected a model that predicts "
            "tokens: leave allocate out"
        )


def _measure(
    teacher: PreTrainedModel,
    ffns: Mapping[str, StockFFN],
    inputs: Inputs,
    seed: int,
    progress: bool,
) -> dict[str, LayerCosts]:
    """The costs of every FFN by path."""
    rows = max(1, min(count_rows(inputs), ALLOCATION_TOKENS // tokens_per_row(inputs)))
    thinning = max(1, rows * tokens_per_row(inputs) // KEPT_TOKENS)
    generator = torch.Generator().manual_seed(seed)
    costs = {path: LayerCosts(teacher, ffn) for path, ffn in ffns.items()}
    starts = range(0, rows, ROWS_AT_ONCE)
    with ExitStack() as stack:
        for path, ffn in ffns.items():
            for handle in _watch(teacher, ffn, costs[path], thinning):
                stack.callback(handle.remove)
        for start in track_progress(starts, "measuring costs", progress):
            batch = select_rows(inputs, slice(start, min(start + ROWS_AT_ONCE, rows)))
            with torch.enable_grad():
                arguments = make_forward_arguments(teacher, batch)
                logits = teacher(**arguments).logits.flatten(0, -2).float()
                probabilities = logits.detach().softmax(-1).cpu()
                drawn = torch.multinomial(probabilities, 1, generator=generator).to(logits.device)
                logits.log_softmax(-1).gather(-1, drawn).sum().backward()
            for layer in costs.values():
                layer.add_gradient()
    return costs


def _watch(
    teacher: PreTrainedModel, ffn: StockFFN, costs: LayerCosts, thinning: int
) -> list[RemovableHandle]:
    """Let ``costs`` see what ``ffn`` reads and writes at every pass."""

    def see_input(x: Tensor) -> None:
        some = x.detach()[::thinning]
        costs.squares.append(costs.weights.coefficients(some).float().square())

    def see_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # The first layer's output begins the graph: nothing before it asks for gradients.
        costs.output = output if output.requires_grad else output.detach().requires_grad_()
        costs.output.retain_grad()
        return costs.output.clone()  # some blocks add to it in place

    base = teacher.base_model
    writer = base.get_submodule(ffn.output_path)
    return [watch_ffn_input(base, ffn.path, see_input), writer.register_forward_hook(see_output)]


def _count_dearest(costs: list[Tensor], wanted: int) -> list[int]:
    """How many units of each layer are among the dearest, ``wanted`` a token in all layers.

    At least one of a layer. The counts add up to ``wanted``, which is at least one for each layer.
    """
    joined = torch.cat([layer.flatten() for layer in costs])
    passing = min(joined.numel(), wanted * len(costs[0]))
    least = joined.kthvalue(joined.numel() - passing + 1).values
    means = [(layer >= least).sum(-1).float().mean().item() for layer in costs]
    counts = [max(1, int(mean)) for mean in means]
    by_remainder = sorted(range(len(means)), key=lambda i: counts[i] - means[i])
    for layer in by_remainder[: max(0, wanted - sum(counts))]:
        counts[layer] += 1
    while sum(counts) > wanted:  # where layers were given the one that they had not earned
        counts[counts.index(max(counts))] -= 1
    return counts
