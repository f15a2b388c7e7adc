"""Closed-form calibration: output prototypes, output bias and temperature of a readout from a sample of tokens.

The output prototypes are re-solved by ridge regression toward where they start (the scaled columns of W_out), with
the strength of the pull chosen on tokens that the solution has not seen. Tokens are seen batch by batch, and only sums over
them are kept; under torch.distributed each process reads a share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint_code.errors import InputError
from .checkpoint_code.ffn import KernelFFN
from .families.hooks import on_input
from .families.lookup import family_name
from .families.registry import get_architecture
from .text.inputs import Inputs, arguments, own_inputs, reads, row_tokens, rows, take

PULLS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the pull toward the initial dictionary, in units of a prototype's mean squared coefficient."""
TEMPERATURES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Candidates for τ, in standard deviations of the log kernel over prototypes."""
FIT_TOKENS = 2048
"""Tokens on which the rows of single units are fitted."""
FIT_ROWS = 32
"""Rows of text that those are taken from: with fewer the fit is worse, with more every layer is read longer."""
BATCH_TOKENS = 4096
"""Tokens that the model reads at once."""
CHUNK = 2048
"""Tokens whose coefficients are held at once."""


def own_text(model: Any, tokens: int, seed: int, length: int = 128) -> Inputs:
    """Token ids (rows, length) of the model's own making, for a calibration without any text.

    A language model samples from itself at temperature 1, from its start token in one half of the rows and from a random token
    in the other; a model without a language head gets uniformly random ids, and one that reads more than ids what
    :func:`hf_kernel_ffn.text.inputs.own_inputs` makes.
    """
    if model.config.is_encoder_decoder or not (reads(model, "input_ids") and model.main_input_name == "input_ids"):
        return own_inputs(model, tokens, seed)
    if reads(model, "pixel_values"):
        return own_inputs(model, tokens, seed)
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
            if past is None:  # an encoder with a language head on it
                return ids
            likely = output.logits[:, -1].float().softmax(-1).cpu()
            ids[:, position : position + 1] = torch.multinomial(likely, 1, generator=generator)
            current = ids[:, position : position + 1].to(device)
    return ids


class _Reached(Exception):
    """The forward pass has come to the module it was made for."""


@torch.no_grad()
def ffn_inputs(model: Any, path: str, ids: Inputs) -> Iterator[Tensor]:
    """Inputs (tokens, hidden_size) of the FFN at ``path`` (under the base model) when the model reads ``ids`` (rows, …),
    batch by batch; nothing from that FFN on is computed, unless it serves several layers.

    Raises:
        InputError: nothing that the model reads comes to that FFN.
    """
    seen: list[Tensor] = []
    shared = get_architecture(family_name(model)).shared

    def stop(x: Tensor) -> None:
        seen.append(x)
        if not shared:
            raise _Reached

    for batch in batches(ids):
        hook = on_input(model.base_model, path, stop)  # for one pass at a time: who takes the batch may call the FFN on it
        try:
            with suppress(_Reached):
                model.base_model(**arguments(model.base_model, batch))
        finally:
            hook.remove()
        if not seen:
            raise InputError(
                f"found no input that comes to {path}, expected some: give the model all that it reads (calibration_ids as a mapping "
                "of its arguments), or leave that part out (layers)"
            )
        yield torch.cat(seen) if len(seen) > 1 else seen[0]
        seen.clear()


def batches(ids: Inputs) -> Iterator[Inputs]:
    """``ids`` (rows, …), about ``BATCH_TOKENS`` at a time."""
    size = max(1, BATCH_TOKENS // row_tokens(ids))
    for first in range(0, rows(ids), size):
        yield take(ids, slice(first, first + size))


def sampled(ids: Inputs) -> Inputs:
    """Those of the rows ``ids`` that :func:`fit_sample` reads."""
    return take(ids, torch.linspace(0, rows(ids) - 1, min(rows(ids), FIT_ROWS)).long())


@torch.no_grad()
def fit_sample(model: Any, path: str, ids: Inputs) -> Tensor:
    """(tokens, hidden_size) float32: about ``FIT_TOKENS`` evenly spaced inputs of the FFN at ``path``, the same on every process."""
    ids = sampled(ids)
    every = max(1, rows(ids) * row_tokens(ids) // FIT_TOKENS)
    return torch.cat([batch[::every].float().contiguous() for batch in ffn_inputs(model, path, ids)])


BLIND_TOKENS = 64
"""Made-up inputs where nothing is calibrated."""


@torch.no_grad()
def blind_sample(norm: nn.Module | None, like: Tensor) -> Tensor:
    """(BLIND_TOKENS, hidden_size) float32: Gaussian hidden states, or what the ``norm`` before an FFN makes of them; ``like``: rows
    of the FFN (…, hidden_size)."""
    sample = torch.randn(BLIND_TOKENS, like.shape[-1], generator=torch.Generator().manual_seed(0)).to(like)
    return (sample if norm is None else norm(sample)).float()


def fitted_and_held(ids: Inputs) -> tuple[Inputs, Inputs]:
    """Rows of ``ids`` (rows, …) to fit on, and the last quarter of them to choose by; this process's share of each."""
    if isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) < 4 <= ids.shape[1]:  # too few to hold out a quarter of them
        ids = ids[:, : ids.shape[1] // 4 * 4].reshape(4 * len(ids), -1)
    split = max(1, rows(ids) * 3 // 4)
    fitted, held = take(ids, slice(split)), take(ids, slice(split, None)) if split < rows(ids) else ids
    if not _distributed():
        return fitted, held
    share = slice(dist.get_rank(), None, dist.get_world_size())
    return take(fitted, share), take(held, share)


class Moments:
    """Sums that a ridge regression of outputs on coefficients needs, accumulated chunk by chunk, and over processes."""

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

    def all_reduce(self) -> None:
        """Make every sum that over all processes of torch.distributed, if it is initialised."""
        if _distributed():
            scalars = torch.tensor([self.count, self.yy], dtype=torch.float64, device=self.cc.device)
            for sums in (scalars, self.cc, self.cy):
                dist.all_reduce(sums)
            self.count, self.yy = scalars.tolist()

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
def calibrate(
    ffn: KernelFFN,
    teacher: Callable[[Tensor], Tensor],
    sample: Tensor,
    fitted: Iterable[Tensor],
    held: Iterable[Tensor],
    temperature: float | None,
) -> dict[str, float]:
    """Fit the output prototypes and output bias of ``ffn`` (float32) to ``teacher``, in place.

    Args:
        sample: (tokens, hidden_size) inputs, the same on every process, whose spread gives the candidates for the temperature.
        fitted: batches (tokens, hidden_size) of inputs on which the solution is found, this process's share.
        held: batches that choose the pull, and the temperature where ``temperature`` is None and the readout has one.

    Returns:
        ``fvu_start`` and ``fvu``: fraction of variance unexplained on the tokens held out, before and after;
        ``pull``; ``dictionary_growth``: norm of the dictionary over that of the initial one at its best scale.
    """
    weight, bias = ffn.output_prototypes.weight, ffn.output_prototypes.bias
    start = torch.cat([weight.T, bias[None]])
    choices: list[float | None] = [None]
    if "temperature" in ffn.log_ratio and temperature is None:
        spread = _log_kernel_spread(ffn, sample)
        choices = [share * spread for share in TEMPERATURES]
    best: tuple | None = None
    for tau, train, test in zip(choices, _moments(ffn, teacher, fitted, choices), _moments(ffn, teacher, held, choices)):
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


def _moments(ffn, teacher, batches, temperatures) -> list[Moments]:
    """Those of every temperature, gathered side by side: inputs are seen once."""
    found = [Moments(ffn.config.prototypes, ffn.config.hidden_size, ffn.units.device) for _ in temperatures]
    for batch in batches:
        for chunk in batch.split(CHUNK):
            outputs = teacher(chunk).float()
            for moments, temperature in zip(found, temperatures):
                if temperature is not None:
                    ffn.reference["temperature"] = temperature
                moments.add(ffn.coefficients(chunk.float()), outputs)
    for moments in found:
        moments.all_reduce()
    return found


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


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
