"""A saved model of the family in recipes/examples/architectures, which brings its own code."""

import json
import shutil

import torch
from teachers import RECIPES
from transformers import AutoConfig, AutoModelForCausalLM

EXAMPLE = RECIPES / "examples" / "architectures" / "causal_mean"
AUTO_MAP = {
    "AutoConfig": "configuration_causal_mean.CausalMeanConfig",
    "AutoModel": "modeling_causal_mean.CausalMeanModel",
    "AutoModelForCausalLM": "modeling_causal_mean.CausalMeanForCausalLM",
}


def save_causal_mean(folder, **config):
    """Save one with random weights in the new ``folder``; ``config`` are settings of it."""
    folder.mkdir()
    for file in EXAMPLE.glob("*_causal_mean.py"):
        shutil.copy(file, folder)
    entry = {"model_type": "causal_mean", "auto_map": AUTO_MAP, **config}
    (folder / "config.json").write_text(json.dumps(entry))
    torch.manual_seed(0)
    loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(loaded, trust_remote_code=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "auto_map": AUTO_MAP}))
    return folder
