"""Closed-form calibration: output prototypes, output bias and temperature of a readout from a sample of tokens.

The output prototypes are re-solved by ridge regression toward where they start (the scaled columns of W_out), with
the strength of the pull chosen on tokens that the solution has not seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .readout import KernelFFN

PULLS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the pull toward the initial dictionary, in units of a prototype's mean squared coefficient."""
TEMPERATURES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Candidates for τ, in standard deviations of the log kernel over prototypes."""
CHUNK = 2048
"""Tokens whose coefficients are held at once."""


def own_text(model: Any, tokens: int, seed: int, length: int = 128) -> Tensor:
    """Token ids (rows, length) of the model's own making, for a calibration without any text.

    A language model samples from itself at temperature 1, from its start token in one half of the rows and from a random token
    in the other; a model without a language head gets uniformly random ids.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    limit = getattr(model.config, "max_position_embeddings", None) or length
    length = min(length, limit)
    rows = max(1, tokens // length)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    head = model.get_output_embeddings()
    if head is None or not model.can_generate():
        return ids
    start = model.config.bos_token_id
    if isinstance(start, int):
        ids[::2, 0] = start
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        current, past = ids[:, :1].to(device), None
        for position in range(1, length):
            output = model(input_ids=current, past_key_values=past, use_cache=True)
            past = output.past_key_values
            likely = output.logits[:, -1].float().softmax(-1).cpu()
            ids[:, position : position + 1] = torch.multinomial(likely, 1, generator=generator)
            current = ids[:, position : position + 1].to(device)
    return ids


@torch.no_grad()
def ffn_inputs(model: Any, paths: list[str], ids: Tensor, batch_tokens: int = 4096) -> dict[str, Tensor]:
    """Inputs (tokens, hidden_size) of the FFNs at ``paths`` (under the base model) when the model reads ``ids`` (rows, length)."""
    kept: dict[str, list[Tensor]] = {path: [] for path in paths}
    hooks = []
    for path in paths:
        store = kept[path]
        hooks.append(
            model.base_model.get_submodule(path).register_forward_pre_hook(
                lambda module, args, store=store: store.append(args[0].flatten(0, -2))
            )
        )
    device = model.get_input_embeddings().weight.device
    try:
        for batch in ids.split(max(1, batch_tokens // ids.shape[1])):
            model.base_model(input_ids=batch.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(parts) for path, parts in kept.items()}


class Moments:
    """Sums that a ridge regression of outputs on coefficients needs, accumulated chunk by chunk; additive."""

    def __init__(self, prototypes: int, size: int, device: torch.device):
        self.count = 0.0
        self.cc = torch.zeros(prototypes + 1, prototypes + 1, device=device)  # the last coefficient is a constant 1
        self.cy = torch.zeros(prototypes + 1, size, device=device)
        self.yy = 0.0

    def add(self, coefficients: Tensor, outputs: Tensor) -> None:
        """``coefficients`` (tokens, prototypes), ``outputs`` (tokens, size)."""
        extended = torch.cat([coefficients, coefficients.new_ones(len(coefficients), 1)], 1)
        self.count += len(outputs)
        self.cc.addmm_(extended.T, extended)
        self.cy.addmm_(extended.T, outputs)
        self.yy += outputs.double().square().sum().item()

    def error(self, dictionary: Tensor) -> float:
        """Mean squared error of ``dictionary`` (prototypes + 1, size; the last row is the output bias)."""
        cross = (dictionary * self.cy).sum(dtype=torch.float64).item()
        square = (dictionary * (self.cc @ dictionary)).sum(dtype=torch.float64).item()
        return (self.yy - 2 * cross + square) / max(self.count, 1)

    def solve(self, start: Tensor, pull: float) -> Tensor:
        """Minimiser of the squared error plus ``pull`` times the squared change from ``start`` (prototypes + 1, size),
        the change of a prototype measured in what it writes."""
        size = self.cc.diagonal().sqrt().clamp_min(1e-12)
        gram = self.cc / size[:, None] / size
        penalty = torch.full_like(size, pull)
        penalty[-1] = 1e-6  # the output bias is free
        gram.diagonal().add_(penalty)
        residual = (self.cy - self.cc @ start) / size[:, None]
        return start + torch.linalg.solve(gram.double(), residual.double()).to(start.dtype) / size[:, None]


@torch.no_grad()
def calibrate(ffn: KernelFFN, teacher: nn.Module, inputs: Tensor, temperature: float | None) -> dict[str, float]:
    """Fit the output prototypes and output bias of ``ffn`` (float32) to ``teacher`` on ``inputs`` (tokens, hidden_size), in place.

    Three quarters of the tokens are fitted; the last quarter chooses the pull, and the temperature where
    ``temperature`` is None and the readout has one.

    Returns:
        ``fvu_start`` and ``fvu``: fraction of variance unexplained on the held-out quarter before and after;
        ``pull``; ``dictionary_growth``: norm of the dictionary over that of the initial one at its best scale.
    """
    split = max(1, len(inputs) * 3 // 4)
    fitted, held = inputs[:split], inputs[split:] if split < len(inputs) else inputs
    weight, bias = ffn.output_prototypes.weight, ffn.output_prototypes.bias
    start = torch.cat([weight.T, bias[None]])
    choices: list[float | None] = [None]
    if "temperature" in ffn.log_ratio and temperature is None:
        spread = _log_kernel_spread(ffn, fitted[:CHUNK])
        choices = [share * spread for share in TEMPERATURES]
    best: tuple | None = None
    for tau in choices:
        if tau is not None:
            ffn.reference["temperature"] = tau
        train, test = _moments(ffn, teacher, fitted), _moments(ffn, teacher, held)
        mean = test.cy[-1] / test.count
        variance = test.yy / test.count - mean.square().sum().item()
        origin = _scaled(train, start)
        for pull in PULLS:
            solution = train.solve(origin, pull)
            error = test.error(solution) / variance
            if best is None or error < best[0]:
                best = (error, tau, pull, solution, test.error(origin) / variance, origin)
    assert best is not None
    error, tau, pull, solution, error_start, origin = best
    if tau is not None:
        ffn.reference["temperature"] = tau
    weight.copy_(solution[:-1].T)
    bias.copy_(solution[-1])
    return {
        "fvu_start": error_start, "fvu": error, "pull": pull,
        "dictionary_growth": (weight.norm() / origin[:-1].norm()).item(),
    }  # fmt: skip


def _moments(ffn, teacher, inputs) -> Moments:
    moments = Moments(ffn.config.prototypes, ffn.config.hidden_size, inputs.device)
    dtype = next(teacher.parameters()).dtype
    for chunk in inputs.split(CHUNK):
        moments.add(ffn.coefficients(chunk.float()), teacher(chunk.to(dtype)).float())
    return moments


def _scaled(moments: Moments, start: Tensor) -> Tensor:
    """``start`` times the one scalar, and with the one bias, that fit best."""
    mean_c, mean_y = moments.cc[-1, :-1] / moments.count, moments.cy[-1] / moments.count
    written = start[:-1]
    square = (written * (moments.cc[:-1, :-1] @ written)).sum() / moments.count - (mean_c @ written).square().sum()
    cross = (written * moments.cy[:-1]).sum() / moments.count - (mean_c @ written) @ mean_y
    scalar = cross / square.clamp_min(1e-30)
    return torch.cat([written * scalar, (mean_y - mean_c @ written * scalar)[None]])


def _log_kernel_spread(ffn, inputs) -> float:
    log_kernel = ffn.kernel.log(*ffn.scores(inputs.float()), **ffn.kernel_parameters())
    fires = torch.isfinite(log_kernel)
    return max(log_kernel[fires].std().item(), 1e-3) if fires.sum() > 1 else 1.0
