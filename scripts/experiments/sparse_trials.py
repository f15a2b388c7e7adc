#!/usr/bin/env python3
"""Trials of what could make a sparse student nearer, at equal tokens and active counts.

A stand-in for a readout of tied rows: the teacher's own units, cut by one threshold a layer, with
outputs and a linear map solved for layer by layer, at what the student itself feeds the layer.

    python scripts/experiments/sparse_trials.py runs/smollm2 --calibration runs/mixed.jsonl \\
        --test wikitext2-test.txt --test recipes/text/books-test.txt --tokens 61440 --rate 0.0004
"""

from __future__ import annotations

import copy
import json
import math
from typing import Annotated

import torch
import typer
from real_fidelity import compare, read_rows
from torch import Tensor, nn
from transformers import PreTrainedModel
from truncation_prices import measure_fisher

from hf_kernel_ffn import load_teacher, load_tokenizer
from hf_kernel_ffn.conversion.ridge import PULLS, Moments, _scale_start

SPIKE = 10
"""Outputs longer than this many medians count as ones of that length."""
ROWS = 16
"""That attention reads at once, and that costs are measured on."""


class Cut(nn.Module):
    """The units of ``mlp`` that pass a threshold, and a linear map."""

    def __init__(self, mlp: nn.Module, price: Tensor, count: int):
        super().__init__()
        self.gate = copy.deepcopy(mlp.gate_proj)
        self.up = copy.deepcopy(mlp.up_proj)
        units, size = mlp.down_proj.in_features, mlp.down_proj.out_features
        self.down = nn.Linear(units, size)
        self.down.weight.data = mlp.down_proj.weight.data.clone()
        self.down.bias.data.zero_()
        self.skip = nn.Linear(size, size, bias=False)
        self.skip.weight.data.zero_()
        self.price = nn.Parameter(price.log(), requires_grad=False)
        self.count = count
        self.threshold = torch.zeros(())
        self.width = 0.0
        """Of the window in which prices get a gradient."""

    def every(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.gate(x)) * self.up(x)

    def loudness(self, c: Tensor) -> Tensor:
        return c.detach().abs().float().clamp_min(1e-20).log() + self.price

    def kept(self, x: Tensor) -> Tensor:
        c = self.every(x)
        self.seen = self.loudness(c)
        if self.width:
            return Threshold.apply(c, self.seen, self.threshold, self.width).to(c.dtype)
        return c * (self.seen >= self.threshold)

    def fit(self, seen: Tensor, rate: float = 1.0) -> None:
        passing = int(self.count * seen[..., 0].numel())
        value = seen.detach().flatten().kthvalue(seen.numel() - passing + 1).values
        self.threshold = self.threshold.lerp(value, rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.kept(x)) + self.skip(x)


class Threshold(torch.autograd.Function):
    """A step whose gradient is that of a ramp (JumpReLU, Rajamanoharan et al. 2024)."""

    @staticmethod
    def forward(ctx, c, seen, threshold, width):  # noqa: ANN001, ANN205
        ctx.save_for_backward(c, seen, threshold)
        ctx.width = width
        return c * (seen >= threshold)

    @staticmethod
    def backward(ctx, gradient):  # noqa: ANN001, ANN205
        c, seen, threshold = ctx.saved_tensors
        near = (seen - threshold).abs() < ctx.width / 2
        return gradient * (seen >= threshold), gradient * c * near / ctx.width, None, None


@torch.no_grad()
def count_by_cost(
    model: PreTrainedModel, ids: Tensor, fisher: list[Tensor], count: int, after_map: bool
) -> list[int]:
    """Active units of each layer, by the cost of leaving units out; ``after_map``: of what a linear
    map leaves of them."""
    costs = []
    seen: list[Tensor] = []
    layers = model.model.layers
    handles = [
        layer.mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0][:, 1:].flatten(0, 1)))
        for layer in layers
    ]
    model.model(ids)
    for handle in handles:
        handle.remove()
    for layer, x, metric in zip(layers, seen, fisher, strict=True):
        down = layer.mlp.down_proj.weight
        c = nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
        if after_map:
            extended = torch.cat([x, torch.ones(len(x), 1)], 1)
            gram = extended.T @ extended
            gram.diagonal().add_(1e-3 * gram.diagonal().mean())
            c = c - extended @ torch.linalg.solve(gram, extended.T @ c)
        costs.append(c[::8].square() * ((metric @ down) * down).sum(0))
    joined = torch.stack(costs)
    kept = count * len(layers) * joined.shape[1]
    least = joined.flatten().kthvalue(joined.numel() - kept + 1).values
    return [max(1, round(x)) for x in (joined >= least).sum(-1).float().mean(1).tolist()]


@torch.no_grad()
def build(
    model: PreTrainedModel,
    ids: Tensor,
    fisher: list[Tensor],
    counts: list[int],
    *,
    by_fisher: bool,
    correct: float,
) -> PreTrainedModel:
    """A student of ``model``; ``correct``: the share of what earlier layers got wrong that a layer
    is to make up for."""
    student = copy.deepcopy(model)
    states = model.model.embed_tokens(ids)
    own = states.clone()
    angles = model.model.rotary_emb(states, torch.arange(ids.shape[1])[None])

    def attend(layer: nn.Module, h: Tensor) -> Tensor:
        parts = []
        for rows in h.split(ROWS):
            normed = layer.input_layernorm(rows)
            written, _ = layer.self_attn(
                hidden_states=normed, position_embeddings=angles, attention_mask=None
            )
            parts.append(rows + written)
        return torch.cat(parts)

    def price(down: Tensor, metric: Tensor) -> Tensor:
        priced = metric @ down if by_fisher else down
        return (priced * down).sum(0).clamp_min(1e-30).sqrt()

    pairs = zip(model.model.layers, student.model.layers, strict=True)
    for number, (layer, ours) in enumerate(pairs):
        states = attend(layer, states)
        own = attend(ours, own)
        written = layer.mlp(layer.post_attention_layernorm(states))
        x = layer.post_attention_layernorm(own)
        target = layer.mlp(x)
        target = target + correct * (states + written - own - target)

        down = layer.mlp.down_proj.weight
        cut = Cut(layer.mlp, price(down, fisher[number]), counts[number])
        some = x.flatten(0, 1)[::8]
        cut.fit(cut.loudness(cut.every(some)))
        longest = SPIKE * written.flatten(0, 1).norm(dim=-1).median().item()
        solve(cut, x, target, longest)
        cut.price.copy_(price(cut.down.weight, fisher[number]).log())
        cut.fit(cut.loudness(cut.every(some)))
        ours.mlp = cut
        states = states + written
        own = own + cut(x)
    return student


def solve(cut: Cut, x: Tensor, target: Tensor, longest: float) -> None:
    """Outputs, map and bias of ``cut`` by ridge regression; the pull by the last quarter."""
    size, units = cut.down.weight.shape
    split = len(x) * 3 // 4
    moments = [Moments(units + size, size, x.device) for _ in range(2)]
    for part, rows in zip(moments, (slice(split), slice(split, None)), strict=True):
        tokens = x[rows].flatten(0, 1).split(2048)
        for some, wanted in zip(tokens, target[rows].flatten(0, 1).split(2048), strict=True):
            part.add(torch.cat([cut.kept(some), some], 1), wanted, longest)
    start = torch.cat([cut.down.weight.T, x.new_zeros(size + 1, size)])
    scaled = _scale_start(moments[0], start)
    solutions = [moments[0].solve(scaled, pull) for pull in PULLS]
    best = min(solutions, key=moments[1].error)
    cut.down.weight.copy_(best[:units].T)
    cut.down.bias.copy_(best[-1])
    cut.skip.weight.copy_(best[units:-1].T)


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Tensor,
    *,
    rate: float,
    hidden: float,
    width: float,
    muon: bool,
    attention: float,
) -> None:
    """The KL to ``teacher`` on all rows of ``data``, four a step, in bfloat16.

    ``hidden``: weight of the hidden states' squared error over the teacher's squares; ``width``: of
    the window in which prices are learned; ``attention``: the rate of attention's matrices.
    """
    in_bfloat16 = copy.deepcopy(teacher).bfloat16()
    student.requires_grad_(False)
    groups = []
    cuts = [layer.mlp for layer in student.model.layers]
    for cut in cuts:
        cut.width = width
        for part in (cut.gate.weight, cut.up.weight, cut.down.weight, cut.skip.weight):
            groups.append({"params": [part], "peak": rate * part.square().mean().sqrt().item()})
        bias = cut.down.bias
        groups.append({"params": [bias], "peak": rate * bias.square().mean().sqrt().item()})
        if width:
            groups.append({"params": [cut.price], "peak": 0.02})
    for layer in student.model.layers if attention else ():
        for part in layer.self_attn.parameters():
            peak = attention * part.square().mean().sqrt().item()
            groups.append({"params": [part], "peak": peak})
    for group in groups:
        group["params"][0].requires_grad_(True)
    matrices = [group for group in groups if muon and group["params"][0].ndim == 2]
    others = [group for group in groups if not muon or group["params"][0].ndim != 2]
    optimizers = [torch.optim.AdamW(others, weight_decay=0)]
    if muon:
        optimizers.append(
            torch.optim.Muon(matrices, weight_decay=0, adjust_lr_fn="match_rms_adamw")
        )

    batches = data.split(4)
    warm = 0.05 * len(batches)
    for step, rows in enumerate(batches):
        way = max(0.0, (step - warm) / (len(batches) - warm))
        share = min(1, (step + 1) / warm) * (1 + math.cos(math.pi * way)) / 2
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
        with torch.no_grad():
            right = in_bfloat16(rows, output_hidden_states=True)
        with torch.autocast("cpu", torch.bfloat16):
            guess = student(rows, output_hidden_states=True)
        wanted = right.logits.float().log_softmax(-1)
        found = guess.logits.float().log_softmax(-1)
        loss = (wanted.exp() * (wanted - found)).sum(-1).mean()
        pairs = list(zip(guess.hidden_states[1:-1], right.hidden_states[1:-1], strict=True))
        for ours, theirs in pairs if hidden else ():
            error = (ours.float() - theirs.float())[:, 1:].square().sum(-1)
            shares = error / theirs[:, 1:].float().square().sum(-1)
            loss = loss + hidden * shares.mean() / len(pairs)
        loss.backward()
        nn.utils.clip_grad_norm_([each["params"][0] for each in groups], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for cut in cuts:
            if not width:
                cut.price.data = cut.down.weight.detach().norm(dim=0).log()
            cut.fit(cut.seen[:, ::4], max(0.05, 1 / (step + 2) if step < 10 else 0))


def main(
    teacher: Annotated[str, typer.Argument(help="folder of a Llama")],
    test: Annotated[list[str], typer.Option(help="held-out text; may be given several times")],
    calibration: str = "recipes/text/books-distil.txt",
    training: str = "runs/mixed.jsonl",
    count: Annotated[int, typer.Option(help="active units per token and layer")] = 192,
    calibration_tokens: int = 16_384,
    tokens: Annotated[int, typer.Option(help="to train on")] = 0,
    by_fisher: Annotated[bool, typer.Option(help="prices in the Fisher metric")] = False,
    after_map: Annotated[bool, typer.Option(help="counts by what a map leaves")] = False,
    correct: Annotated[float, typer.Option(help="of earlier layers' errors")] = 0.0,
    rate: float = 0.001,
    hidden: float = 0.0,
    width: float = 0.0,
    muon: bool = False,
    attention: Annotated[float, typer.Option(help="rate of attention, trained too")] = 0.0,
) -> None:
    """Print the fidelity of one trial on every test text."""
    model = load_teacher(teacher).requires_grad_(False)
    tokenizer = load_tokenizer(teacher)
    ids = read_rows(tokenizer, calibration, calibration_tokens, spread=True)
    paths = [f"layers.{number}.mlp" for number in range(len(model.model.layers))]
    by_path = measure_fisher(model, paths, ids[:ROWS], 0)
    fisher = [by_path[path] for path in paths]
    counts = count_by_cost(model, ids[:ROWS], fisher, count, after_map)
    student = build(model, ids, fisher, counts, by_fisher=by_fisher, correct=correct)
    if tokens:
        data = read_rows(tokenizer, training, tokens)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        options = {"rate": rate, "hidden": hidden, "width": width, "muon": muon}
        options["attention"] = attention
        train(student.train(), model, data[order], **options)
    student.eval()
    for name in test:
        rows = read_rows(tokenizer, name, 4096)
        typer.echo(json.dumps({"text": name, **compare(student, model, rows)}))


if __name__ == "__main__":
    typer.run(main)
