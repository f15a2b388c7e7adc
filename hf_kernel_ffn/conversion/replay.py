"""A model of which one block at a time has weights: the blocks before it put out what they once did."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import initialize_module
from ..families.lookup import StockFFN
from ..families.student import get_name_prefix
from ..text.inputs import Inputs, make_forward_arguments
from .sampling import select_fit_rows, split_batches, split_fitted_and_held
from .tensor_files import Reader


class Replay:
    """A model on the meta device of which one block at a time has weights: the blocks before it put out what they once did."""

    def __init__(self, model: Any, reader: Reader, stack: str):
        self.base, self.reader, self.stack, self.dtype = (
            model.base_model,
            reader,
            stack,
            model.dtype,
        )
        self.blocks: Any = self.base.get_submodule(stack)
        self.outputs: dict[bytes, Any] = {}
        self.key = b""
        for module in model.modules():  # buffers that no file has, such as rotary frequencies
            names = [
                name
                for name, buffer in module._buffers.items()
                if buffer is not None and buffer.is_meta
            ]
            for name in names:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            if names:
                initialize_module(model, module)
        self.prefix, self.embedding = get_name_prefix(model), model.get_input_embeddings()
        inside = {id(p) for p in (*self.blocks.parameters(), *self.embedding.parameters())}
        for name, parameter in list(self.base.named_parameters()):
            if id(parameter) not in inside:
                self.place(name, reader.read(self.prefix + name))
        self.embedding_name = next(
            self.prefix + name
            for name, p in self.base.named_parameters()
            if p is self.embedding.weight
        )
        self.embedding.forward = self._embed
        self.embedding.padding_idx = None  # may be none of the rows that are there
        self.embedding.weight = _constant(
            torch.empty(0, dtype=self.dtype)
        )  # says where token ids are to be

    def _embed(self, ids: Tensor) -> Tensor:
        self.key = str(tuple(ids.shape)).encode() + ids.contiguous().numpy().tobytes()
        if self.key in self.outputs:  # what the first block is given is not looked at any more
            return torch.zeros(*ids.shape, self.embedding.embedding_dim, dtype=self.dtype)
        unique, inverse = ids.unique(return_inverse=True)
        self.embedding.weight = _constant(
            self.reader.rows(self.embedding_name, unique).to(self.dtype)
        )
        return type(self.embedding).forward(self.embedding, inverse)

    def names(self, number: int) -> list[str]:
        """Names of the tensors of a block, under the base model."""
        return [
            f"{self.stack}.{number}.{name}" for name, _ in self.blocks[number].named_parameters()
        ]

    def read_by(self, ffns: list[StockFFN]) -> set[str]:
        """Names of the tensors that converting ``ffns`` without calibration reads: theirs, and those of the norms before them."""
        modules = [
            module
            for ffn in ffns
            for module in (ffn.host, ffn.norm(self.base))
            if module is not None
        ]
        inside = {id(p) for module in modules for p in module.parameters()}
        return {self.prefix + name for name, p in self.base.named_parameters() if id(p) in inside}

    def place(self, name: str, tensor: Tensor) -> None:
        """Give the parameter ``name``, under the base model, these numbers."""
        parent, _, leaf = name.rpartition(".")
        self.base.get_submodule(parent)._parameters[leaf] = _constant(tensor.to(self.dtype))

    def leave(self, number: int) -> None:
        """Give up the weights of a block."""
        self.blocks[number].to("meta")

    def advance(self, number: int, ids: Inputs) -> None:
        """Keep what block ``number`` puts out when a conversion reads ``ids`` (rows, length), and let it put out that from then on."""
        outputs: dict[bytes, Any] = {}

        def stop(module, args, output):
            outputs[self.key] = output
            raise _Done

        hook = self.blocks[number].register_forward_hook(stop)
        for part in (select_fit_rows(ids), *split_fitted_and_held(ids)):
            for batch in split_batches(part):
                with suppress(_Done):
                    self.base(**make_forward_arguments(self.base, batch))
        hook.remove()
        self.outputs = outputs
        self.blocks[number].forward = lambda *args, **kwargs: self.outputs[self.key]


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class _Done(Exception):
    """The forward pass has come as far as it is needed."""
