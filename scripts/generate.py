#!/usr/bin/env python3
"""Let a model, stock or converted, go on with a prompt: python scripts/generate.py MODEL PROMPT."""

from typing import Annotated

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, logging, set_seed


def main(
    model: str,
    prompt: str,
    tokens: Annotated[int, typer.Option(help="to write at most")] = 60,
    seed: int = 0,
) -> None:
    """Print MODEL's name and PROMPT with what follows it, sampled."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    output = loaded.generate(
        **tokenizer(prompt, return_tensors="pt"),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        pad_token_id=tokenizer.eos_token_id,
    )
    typer.echo(f"{model}: {tokenizer.decode(output[0], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    typer.run(main)
