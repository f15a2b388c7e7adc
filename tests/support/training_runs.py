"""Distillations that are run, interrupted and compared."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_kernel_ffn.distillation import distill
from hf_kernel_ffn.distillation.objectives import OBJECTIVES
from hf_kernel_ffn.distillation.step import Step
from hf_kernel_ffn.distillation.teacher_signal import RunningTeacher

LAYER_WISE = {
    "name": "layer-wise",
    "tokens": 384,
    "learning_rate": 0.002,
    "batch_size": 2,
}  # six steps
LOGITS = {"name": "logits", "tokens": 384, "learning_rate": 0.002, "batch_size": 2}
STEPS = 6


def run(recipe, **more):
    return distill(recipe, progress=False, **more)


def make_step(stage, teacher, student, ffns, batch, **more):
    """One batch of a step, with a running teacher."""
    return Step(stage, RunningTeacher(teacher), student, ffns, batch, **more)


def move_away(student):
    """Change what the FFNs of ``student`` write by a third: a conversion into tied rows is so near
    its teacher that an optimiser would follow rounding errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for ffn in student.kernel_ffns().values():
            weight = ffn.output_prototypes.weight
            weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=generator))


class Interrupted(BaseException):
    """As a KeyboardInterrupt: nobody catches it."""


def interrupt(monkeypatch, recipe, at, result=Interrupted):
    """Run ``recipe`` until the training call ``at`` of an objective, which is interrupted, or
    returns ``result``."""
    count = iter(range(10**6))

    def wrap(objective):
        def wrapped(step):
            loss = objective(step)
            if step.backward is None or next(count) < at:  # held-out text, or not yet
                return loss
            if result is Interrupted:
                raise Interrupted
            return torch.tensor(result)

        return wrapped

    with monkeypatch.context() as patch:
        for name, objective in list(OBJECTIVES.items()):
            patch.setitem(OBJECTIVES, name, wrap(objective))
        with pytest.raises(Interrupted if result is Interrupted else FloatingPointError) as caught:
            run(recipe)
    return caught.value


def assert_same_files(one, other):
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    tensors, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    for name in ("config.json", "tokenizer.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
