"""Run by test_parallel_plan.py under torchrun: what students compute in several processes.

argv: a JSON file with a folder of checkpoints and their names. The first process writes logits and
gradients of each beside it.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def gather(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().contiguous()


def run(folder):
    """Logits with and without gradients, and the gradients of a loss, by name."""
    plan = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=plan, trust_remote_code=True
    )
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        found = {"inference": gather(model(ids).logits)}
    output = model(ids, labels=ids)
    output.loss.backward()
    found["logits"] = gather(output.logits)
    for path, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[path] = gather(parameter.grad)
    check_parts(model)
    return found


def check_parts(model):
    """Tied rows are split, and their records are refused; free rows are not."""
    for path, ffn in model.kernel_ffns().items():
        is_tied = ffn.config.settings.rows == "tied"
        for name, parameter in ffn.named_parameters():
            is_split = isinstance(parameter, DTensor)
            assert is_split == (is_tied and not name.startswith("log_ratio.")), (path, name)
        if not is_tied:
            continue
        assert ffn.pieces["amount"].to_local().shape[-1] * 2 == ffn.config.prototypes
        try:
            ffn.readout(torch.zeros(1, ffn.config.hidden_size))
        except ValueError as error:  # InputError of the code beside the weights
            assert "spread over processes" in str(error)
        else:
            raise AssertionError("a record of half the units")


if __name__ == "__main__":
    work = json.loads(Path(sys.argv[1]).read_text())
    for name in work["names"]:
        found = run(Path(work["folder"], name))
        if dist.get_rank() == 0:
            save_file(found, Path(work["folder"], f"{name}.safetensors"))
    dist.destroy_process_group()
