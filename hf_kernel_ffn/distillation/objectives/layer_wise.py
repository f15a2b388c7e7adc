"""layer-wise: every FFN by itself regresses its teacher's output on the teacher's own inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...checkpoint_code.parameters import to_at_least_float32
from ...conversion.figures import shrink_spikes
from ...text.inputs import Inputs
from ..collectives import count_processes, mean_over_processes, sum_over_processes
from ..spikes import measure_longest_ordinary
from ..step import Step, TargetStatistics
from ..teacher_signal import TeacherSignal
from .registry import register_objective

LEAST_VARIANCE = 1e-12
"""Below this a target counts as constant, and the error is not divided by less."""


@register_objective("layer-wise")
def layer_wise(step: Step) -> Tensor:
    """Mean over FFNs of the fraction of variance unexplained, from one pass of the teacher.

    Each FFN goes backward by ``step.backward``, its price included, before the next one's turn, so
    that one FFN's graph lives at a time. The loss returned has none.

    Where the optimiser's step has several batches (gradient accumulation) or processes, the
    variance is that of all of them: the loss is as if they were one. An expert of a mixture counts
    by its tokens, and not at all where no process has any.

    A spike (:mod:`hf_kernel_ffn.distillation.spikes`) counts as a token whose target is as long as
    an ordinary one may be: its error is scaled down with it. It would be all that is seen. Where a
    step has several batches, the first says how long that is.
    """
    losses: list[Tensor] = []
    calls: Counter[str] = Counter()
    statistics = step.statistics
    if len(step.batches) > 1 and not statistics:
        statistics.update(measure_targets(step.signal, step.batches, step.ffns))

    def regress(path: str, inputs: Tensor, outputs: Tensor) -> None:
        ffn = step.ffns[path]
        device = next(ffn.parameters()).device  # the teacher may be on another one
        target = to_at_least_float32(outputs.detach()).to(device)
        targets = statistics.get((path, calls[path])) or statistics_of_one_call(target)
        calls[path] += 1

        with torch.set_grad_enabled(step.backward is not None):
            loss = target.new_zeros(())
            if len(target):
                predicted = to_at_least_float32(ffn(inputs.detach().to(device)))
                shrink = shrink_spikes(target, targets.longest)
                error = ((predicted - target) * shrink).square().mean()
                share = len(target) / targets.tokens  # 1 but for the experts of a mixture
                loss = error / targets.variance.clamp_min(LEAST_VARIANCE) * share
            if step.backward is not None:
                total = loss + step.price(path)
                if total.requires_grad:
                    step.backward(total)
        if len(target) or targets.tokens > 0:  # in this order: the second waits for a GPU
            losses.append(loss.detach())

    with torch.no_grad():
        step.signal.watch_ffns(step.batch, list(step.ffns), regress)
    return torch.stack(losses).mean()


def statistics_of_one_call(target: Tensor) -> TargetStatistics:
    """The statistics of ``target`` (tokens, hidden_size) and of the other processes' targets."""
    total = sum_over_processes(target.new_tensor(float(len(target))))
    tokens = total / count_processes()
    share = len(target) / tokens.clamp_min(1 / count_processes())
    longest = measure_longest_ordinary(target)
    if not len(target):
        target = target.new_zeros(1, target.shape[-1])  # counted with a share of 0
    target = target * shrink_spikes(target, longest)

    center = mean_over_processes(share * target.mean(0))
    variance = mean_over_processes(share * (target - center).square().mean())
    return TargetStatistics(tokens, _spread(variance, center, total), longest)


def _spread(variance: Tensor, center: Tensor, total: Tensor) -> Tensor:
    """``variance``, or the mean square around zero where an expert got one token in ``total``,
    which has no variance."""
    return torch.where(total < 2, variance + center.square().mean(), variance)


def measure_targets(
    signal: TeacherSignal, batches: Sequence[Inputs], ffns: Mapping[str, nn.Module]
) -> dict[tuple[str, int], TargetStatistics]:
    """The statistics of every FFN's targets over all ``batches`` and processes.

    The teacher reads the batches once for this; nothing but sums is kept.
    """
    moments: dict[tuple[str, int], _Moments] = {}
    for batch in batches:
        calls: Counter[str] = Counter()

        def add(path: str, inputs: Tensor, outputs: Tensor, calls: Counter[str] = calls) -> None:
            device = next(ffns[path].parameters()).device
            target = to_at_least_float32(outputs.detach()).to(device)
            key = (path, calls[path])
            calls[path] += 1
            if key not in moments:
                moments[key] = _Moments(target)
            moments[key].add(target)

        with torch.no_grad():
            signal.watch_ffns(batch, list(ffns), add)
    return {key: moment.statistics(len(batches)) for key, moment in moments.items()}


class _Moments:
    """Count, mean and squares around the mean of targets that come in several calls.

    Updated as in Chan, Golub & LeVeque 1983 (The American Statistician 37(3)), equation 2.1.
    """

    def __init__(self, first: Tensor):
        """Begin before the targets (tokens, hidden_size) that come ``first``, which say what a
        spike is."""
        self.longest = measure_longest_ordinary(first)
        self.count = 0
        self.mean = first.new_zeros(first.shape[-1])
        self.squares = first.new_zeros(first.shape[-1])

    def add(self, target: Tensor) -> None:
        """Take in ``target`` (tokens, hidden_size)."""
        if not len(target):
            return
        target = target * shrink_spikes(target, self.longest)
        mean = target.mean(0)
        apart = mean - self.mean
        total = self.count + len(target)
        self.squares += (target - mean).square().sum(0)
        self.squares += apart.square() * (self.count * len(target) / total)
        self.mean = self.mean + apart * (len(target) / total)
        self.count = total

    def statistics(self, calls: int) -> TargetStatistics:
        """The statistics over all processes, after that many calls of each."""
        total = sum_over_processes(self.mean.new_tensor(float(self.count)))
        count = total / count_processes()
        share = self.count / count.clamp_min(1 / count_processes())
        center = mean_over_processes(share * self.mean)
        within = self.squares.mean() / max(1, self.count)
        between = (self.mean - center).square().mean()
        variance = mean_over_processes(share * (within + between))
        return TargetStatistics(count / calls, _spread(variance, center, total), self.longest)
