"""The experts of a mixture, each a kernel-readout FFN.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

import torch
from torch import Tensor, nn


class KernelExperts(nn.Module):
    """The experts of a mixture, each a KernelFFN named by its number; called as the stock ones."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of what each token's experts write, (tokens, hidden_size).

        Args:
            hidden_states: (tokens, hidden_size).
            top_k_index: (tokens, k) numbers of the experts that each token goes to.
            top_k_weights: (tokens, k) what their outputs are multiplied by.
        """
        written = torch.zeros_like(hidden_states)
        for number, expert in self.named_children():
            tokens, places = torch.where(top_k_index == int(number))
            if len(tokens):
                weights = top_k_weights[tokens, places, None]
                output = expert(hidden_states[tokens]) * weights
                written.index_add_(0, tokens, output.to(written.dtype))
        return written
