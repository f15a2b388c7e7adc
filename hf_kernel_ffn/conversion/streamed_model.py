"""A model on the meta device of which one block at a time has weights, read from files."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import initialize_module
from ..families.lookup import StockFFN
from ..families.student import get_name_prefix
from .replay import find_only_stack
from .tensor_reader import Reader


class StreamedModel:
    """A model on the meta device of which one block at a time has weights.

    What is outside of the blocks has its weights throughout, but for the embedding of token ids: of
    that the rows are read that a batch asks for.
    """

    def __init__(self, model: PreTrainedModel, reader: Reader, device: str | torch.device = "cpu"):
        """Give ``model``, one stack of blocks, all that is outside of them from ``reader``.

        Args:
            device: where everything that has weights is.
        """
        self.model = model
        self.device = torch.device(device)
        self.base = model.base_model
        self.reader = reader
        self.dtype = model.dtype
        self.prefix = get_name_prefix(model)
        self.stack = find_only_stack(model)
        self.blocks = list(self.base.get_submodule(self.stack).children())
        self.embedding = cast(nn.Embedding, model.get_input_embeddings())
        self._embedding_is_read = True

        self._make_buffers()
        self._place_what_is_outside()
        self._take_over_embedding()

    def _make_buffers(self) -> None:
        """Give the buffers that no file has, such as rotary frequencies, their numbers."""
        for module in self.model.modules():
            buffers = module._buffers
            names = [
                name for name, buffer in buffers.items() if buffer is not None and buffer.is_meta
            ]
            for name in names:
                buffers[name] = torch.empty_like(cast(Tensor, buffers[name]), device="cpu")
            if names:
                initialize_module(self.model, module)
            for name, buffer in buffers.items():
                if buffer is not None:
                    buffers[name] = buffer.to(self.device)

    def _place_what_is_outside(self) -> None:
        """Read the parameters that are neither the blocks' nor the embedding's."""
        modules = [*self.blocks, self.embedding]
        inside = {id(parameter) for module in modules for parameter in module.parameters()}
        for name, parameter in list(self.base.named_parameters()):
            if id(parameter) not in inside:
                self.place(name, self.reader.read(self.prefix + name))

    def _take_over_embedding(self) -> None:
        """Let the embedding look its rows up in the files."""
        self._embedding_name = next(
            self.prefix + name
            for name, parameter in self.base.named_parameters()
            if parameter is self.embedding.weight
        )
        self.embedding.forward = self._embed  # type: ignore[method-assign]
        self.embedding.padding_idx = None  # may be none of the rows that are there
        # Says where token ids are to be.
        self.embedding.weight = _make_constant(torch.empty(0, dtype=self.dtype, device=self.device))

    def _embed(self, input: Tensor) -> Tensor:
        if not self._embedding_is_read:
            shape = (*input.shape, self.embedding.embedding_dim)
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        unique, inverse = input.unique(return_inverse=True)
        rows = self.reader.rows(self._embedding_name, unique)
        self.embedding.weight = _make_constant(rows.to(self.device, self.dtype))
        return type(self.embedding).forward(self.embedding, inverse)

    def stop_reading_embedding(self) -> None:
        """Let token ids be embedded as zeros, once no block computes from them any more."""
        self._embedding_is_read = False

    def get_block_names(self, number: int) -> list[str]:
        """Return the names of the tensors of a block in the whole model."""
        names = [name for name, _ in self.blocks[number].named_parameters()]
        return [f"{self.prefix}{self.stack}.{number}.{name}" for name in names]

    def get_names_read_by(self, ffns: list[StockFFN]) -> set[str]:
        """Return the names of the tensors that converting ``ffns`` without calibration reads.

        They are those of the FFNs, and of the norms before them.
        """
        norms = [ffn.norm(self.base) for ffn in ffns]
        modules = [*(ffn.host for ffn in ffns), *(norm for norm in norms if norm is not None)]
        inside = {id(parameter) for module in modules for parameter in module.parameters()}
        return {
            self.prefix + name
            for name, parameter in self.base.named_parameters()
            if id(parameter) in inside
        }

    def place(self, name: str, tensor: Tensor) -> None:
        """Give the parameter ``name``, under the base model, these numbers."""
        parent, _, leaf = name.rpartition(".")
        parameters = self.base.get_submodule(parent)._parameters
        parameters[leaf] = _make_constant(tensor.to(self.device, self.dtype))

    def drop_block(self, number: int) -> None:
        """Give up the weights of a block."""
        self.blocks[number].to("meta")


def _make_constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
