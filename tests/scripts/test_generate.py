"""What a model writes after a prompt, as the demo shows it."""

import subprocess
import sys

import pytest
from teachers import RECIPES

ROOT = RECIPES.parent


def generate(*arguments):
    command = [sys.executable, "scripts/generate.py", "recipes/teachers/llama", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", [[], ["--bos", "always"]], ids=["as it is", "with BOS"])
def test_a_model_goes_on_with_a_prompt(options):
    done = generate("The old man", "--tokens", "5", *options)
    assert done.returncode == 0, done.stderr
    name, text = done.stdout.split(": ", 1)
    assert name == "recipes/teachers/llama" and "The old man" in text


@pytest.mark.parametrize("options", [["--bos", "maybe"], ["--chat"]], ids=["bos", "no template"])
def test_what_cannot_be_asked_is_one_line(options):
    done = generate("The old man", *options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
