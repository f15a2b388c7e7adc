"""Tiny Llamas as GGUF files, written by the package gguf as llama.cpp's converter writes them."""

import json

import torch
from teachers import tiny_teacher

HEADS = ("attn_q", "attn_k")
"""Whose rows llama.cpp keeps in another order."""
BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
REST = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
NORMAL, CONTROL = 1, 3


def make_llama():
    """A Llama with the shipped tokenizer's vocabulary; widths are multiples of 32, a block of
    Q8_0."""
    return tiny_teacher(
        "llama",
        vocab_size=4096,
        intermediate_size=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


def write_gguf(file, model, tokenizer, kind="F32", architecture="llama", claims=None, more=None):
    """Write a Llama and its byte-level tokenizer, matrices as ``kind``: F32, F16 or Q8_0.

    ``claims`` are other values for what the file says of the model, ``more`` are further tensors.
    """
    import gguf

    writer = gguf.GGUFWriter(str(file), architecture)
    _write_config(writer, model.config, claims or {})
    _write_tokenizer(writer, tokenizer)
    for name, tensor in [*_list_tensors(model), *(more or {}).items()]:
        array = tensor.detach().float().numpy()
        if kind == "F32" or array.ndim == 1:
            writer.add_tensor(name, array)
        elif kind == "F16":
            writer.add_tensor(name, array.astype("float16"))
        else:
            quantised = getattr(gguf.GGMLQuantizationType, kind)
            packed = gguf.quants.quantize(array, quantised)
            writer.add_tensor(name, packed, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def round_as(model, kind):
    """The same model with its matrices as a file of that ``kind`` has them."""
    import gguf

    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1 and kind == "F16":
            tensor = tensor.half().float()
        elif tensor.ndim > 1 and kind != "F32":
            quantised = getattr(gguf.GGMLQuantizationType, kind)
            packed = gguf.quants.quantize(tensor.numpy(), quantised)
            tensor = torch.from_numpy(gguf.quants.dequantize(packed, quantised))
        state[name] = tensor
    rounded = type(model)(model.config)
    rounded.load_state_dict(state)
    return rounded.eval()


def _write_config(writer, config, claims):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(claims.get("block_count", config.num_hidden_layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer, tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if i in special else NORMAL for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _list_tensors(model):
    config = model.config
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        path = name.removesuffix(".weight")
        if path in REST:
            yield f"{REST[path]}.weight", tensor
            continue
        number, _, part = path.removeprefix("model.layers.").partition(".")
        short = BLOCK[part]
        if short in HEADS:
            heads = config.num_attention_heads
            tensor = _interleave(tensor, heads if short == "attn_q" else config.num_key_value_heads)
        yield f"blk.{number}.{short}.weight", tensor


def _interleave(weight, heads):
    """Rows of a rotary projection: the two halves of each head in turn."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
