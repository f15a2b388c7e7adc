#!/usr/bin/env python3
"""Let a model, stock or converted, go on with a prompt: python scripts/generate.py MODEL PROMPT.

With --chat it answers a question, through its tokenizer's chat template.
"""

from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, logging, set_seed

from hf_kernel_ffn.cli.app import run_app
from hf_kernel_ffn.cli.options import Bos, Chat
from hf_kernel_ffn.storage.loading import load_tokenizer
from hf_kernel_ffn.storage.model_files import load_pretrained
from hf_kernel_ffn.text.prompts import encode_prompt
from hf_kernel_ffn.text.text_format import TextFormat


def main(
    model: Annotated[str, typer.Argument(help="local folder, .gguf file or hub id")],
    prompt: str,
    tokens: Annotated[int, typer.Option(help="to write at most")] = 60,
    seed: int = 0,
    chat: Chat = False,
    bos: Bos = "auto",
) -> None:
    """Print MODEL's name and PROMPT with what follows it, sampled."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(seed)
    tokenizer = load_tokenizer(model)
    text_format = TextFormat(chat=chat, bos=bos)
    ids = torch.tensor([encode_prompt(tokenizer, prompt, text_format)])
    loaded = load_pretrained(AutoModelForCausalLM.from_pretrained, model, trust_remote_code=True)
    output = loaded.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        pad_token_id=tokenizer.eos_token_id,
    )
    typer.echo(f"{model}: {tokenizer.decode(output[0], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    run_app(lambda: typer.run(main))
