"""A converted model's layers as ReLU transcoders, where they are exactly that.

A transcoder of circuit-tracer writes ``relu(x · W_enc.T + b_enc) · W_dec + b_dec``. These layers
are one:

* tied rows with the kernel ``brownian`` in an FFN without a gate. A unit's coefficient is piecewise
  linear in its one score s, with bends at zero and at its knots, and so a sum of ReLUs:

      f(s) = Σ_{k>0} a_k (relu(s) − relu(s − k)) + Σ_{k<0} a_k (relu(−s) − relu(−s − |k|))

  A unit of P pieces becomes P + 2 features.
* an untouched FFN without a gate whose activation is ReLU: a feature for every unit.

All others are refused by name. A product of two scores (any gated FFN, values product or gated), a
kernel that is curved or reads a distance, and shares with a denominator are no sum of ReLUs of
linear scores, and so no transcoder of this format or of SAELens's.
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...checkpoint_code.errors import InputError
from ...checkpoint_code.linears import get_effective_weight
from ...checkpoint_code.record import ReadableFFN
from ...checkpoint_code.tied import TiedKernelFFN
from ...families.lookup import find_stock_ffn
from ...families.weights import read_stock_weights
from ...storage.files import new_folder, write_text
from ..model_parts import find_ffn_module, get_layer_number, has_tied_rows, list_ffn_paths

INPUT_HOOK = "mlp.hook_in"
"""Where circuit-tracer reads what an FFN reads."""
OUTPUT_HOOK = "hook_mlp_out"
"""Where circuit-tracer puts what an FFN writes."""


@torch.no_grad()
def make_transcoder(model: PreTrainedModel, path: str) -> dict[str, Tensor]:
    """The FFN at ``path`` as a ReLU transcoder, float32.

    Returns:
        W_enc and W_dec (features, hidden_size), b_enc (features,) and b_dec (hidden_size,).

    Raises:
        InputError: the FFN is not exactly one.
    """
    ffn = find_ffn_module(model, path)
    if has_tied_rows(ffn):
        _require_one_score(path, ffn)
        return _split_knots(ffn)
    if isinstance(ffn, ReadableFFN):
        kernel = getattr(ffn.config.settings, "kernel", type(ffn).__name__)
        raise _refuse(path, f"free rows with the kernel {kernel!r}")

    weights = read_stock_weights(model, find_stock_ffn(model, path))
    if weights.gate is not None:
        raise _refuse(path, "an untouched FFN with a gate")
    if not _is_relu(weights.activation):
        raise _refuse(path, f"an untouched FFN with {type(weights.activation).__name__}")
    down_bias = weights.down_bias
    up_bias = weights.up_bias
    return {
        "W_enc": _copy(weights.up),
        "b_enc": _copy(weights.up.new_zeros(len(weights.up)) if up_bias is None else up_bias),
        "W_dec": _copy(weights.down),
        "b_dec": _copy(
            weights.down.new_zeros(weights.down.shape[1]) if down_bias is None else down_bias
        ),
    }


def export_transcoders(folder: str | Path, model: PreTrainedModel) -> None:
    """Write all layers of ``model`` as a transcoder set that circuit-tracer loads.

    The folder gets ``layer_N.safetensors`` for every block and a ``config.yaml``.

    Raises:
        InputError: a layer is not exactly a ReLU transcoder, they have different numbers of
            features, or the folder is not empty.
    """
    transcoders = {
        get_layer_number(path): make_transcoder(model, path) for path in list_ffn_paths(model)
    }
    sizes = {len(tensors["b_enc"]) for tensors in transcoders.values()}
    if len(sizes) > 1:
        raise InputError(
            f"found layers of {sorted(sizes)} features, expected one number: "
            "a transcoder set has one"
        )
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    config = {
        "model_kind": "transcoder_set",
        "model_name": name,
        "scan": Path(name).name,
        "feature_input_hook": INPUT_HOOK,
        "feature_output_hook": OUTPUT_HOOK,
        "transcoders": [f"layer_{layer}.safetensors" for layer in sorted(transcoders)],
    }
    with new_folder(folder) as made:
        for layer, tensors in transcoders.items():
            save_file(tensors, made / f"layer_{layer}.safetensors")
        write_text(made / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def _require_one_score(path: str, ffn: TiedKernelFFN) -> None:
    """InputError unless the units of ``ffn`` are piecewise linear in one score."""
    if ffn.config.gated:
        raise _refuse(path, f"tied rows of a gated FFN with values {ffn.config.settings.values!r}")
    if not ffn.kernel.uses_knot:
        raise _refuse(path, f"tied rows with the kernel {ffn.kernel.name!r}")


def _refuse(path: str, found: str) -> InputError:
    return InputError(
        f"found {found} at {path}, expected units that are sums of ReLUs of one score each, as a "
        "transcoder has: only FFNs without a gate, with tied rows and the kernel brownian or with "
        "ReLU, are exactly one"
    )


def _is_relu(activation: nn.Module) -> bool:
    """Whether ``activation`` is max(0, x), as numbers say."""
    probe = torch.linspace(-4, 4, 33)
    return torch.equal(activation(probe), probe.relu())


def _split_knots(ffn: TiedKernelFFN) -> dict[str, Tensor]:
    """The features of a layer with tied rows: per unit relu(s) and relu(−s), then one a piece."""
    example = ffn.input_prototypes.weight.new_empty(1, ffn.config.hidden_size)
    rows, bias = get_effective_weight(ffn.input_prototypes, example)
    columns, output_bias = get_effective_weight(ffn.output_prototypes, example)
    dictionary = columns.T
    bias = rows.new_zeros(len(rows)) if bias is None else bias
    knot = ffn.pieces["knot"]
    amount = ffn.pieces["amount"] * ffn.positive("scale")
    after = knot > 0
    zero = torch.zeros_like(amount)
    up = amount.where(after, zero).sum(0)
    down = amount.where(knot < 0, zero).sum(0)

    encoders = [rows, -rows]
    biases = [bias, -bias]
    decoders = [up[:, None] * dictionary, down[:, None] * dictionary]
    for piece in range(len(knot)):
        side = torch.where(after[piece], 1.0, -1.0)
        encoders.append(side[:, None] * rows)
        biases.append(side * bias - knot[piece].abs())
        bends = amount[piece].where(knot[piece] != 0, zero[piece])
        decoders.append(-bends[:, None] * dictionary)
    size = ffn.config.hidden_size
    return {
        "W_enc": _copy(torch.cat(encoders)),
        "b_enc": _copy(torch.cat(biases)),
        "W_dec": _copy(torch.cat(decoders)),
        "b_dec": _copy(rows.new_zeros(size) if output_bias is None else output_bias),
    }


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous float32 copy on the CPU."""
    return tensor.detach().float().cpu().contiguous().clone()
