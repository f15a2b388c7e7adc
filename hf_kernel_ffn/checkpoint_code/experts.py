"""The experts of a mixture, a kernel-readout FFN each.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

import torch
from torch import Tensor, nn


class KernelExperts(nn.Module):
    """The experts of a mixture, a :class:`KernelFFN` each, numbered; called as the stock experts are."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` (tokens, hidden_size), the experts chosen for them (tokens, k) and those's weights (tokens, k), to
        (tokens, hidden_size)."""
        written = torch.zeros_like(hidden_states)
        for number, expert in self.named_children():
            token, place = torch.where(top_k_index == int(number))
            if len(token):
                output = expert(hidden_states[token]) * top_k_weights[token, place, None]
                written.index_add_(0, token, output.to(written.dtype))
        return written
