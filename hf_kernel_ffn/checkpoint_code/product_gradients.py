"""The backward pass of one_pass.py by way of its matrix products.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import TENSORS, MixtureArguments


class ProductGradients:
    """Gradients of the tensors that enter by matrix products, summed chunk by chunk.

    None where not wanted. The first chunk writes them, the others add.
    """

    def __init__(self, given: MixtureArguments, dtype: torch.dtype, wanted: list[bool]):
        wanted_by_name = dict(zip(MixtureArguments._fields[:TENSORS], wanted, strict=True))
        new = torch.empty_like if len(given.x) else torch.zeros_like
        self.x = given.x.to(dtype)
        self.rows = given.rows.to(dtype)
        self.up = None if given.up is None else given.up.to(dtype)
        self.d_dictionary: Tensor | None = None
        self.d_x: Tensor | None = None
        self.d_rows: Tensor | None = None
        self.d_up: Tensor | None = None
        if wanted_by_name["dictionary"]:
            self.d_dictionary = new(given.dictionary, dtype=given.mix)
        if wanted_by_name["x"]:
            self.d_x = new(given.x, dtype=dtype)
        if wanted_by_name["rows"]:
            self.d_rows = new(given.rows, dtype=dtype)
        if given.up is not None and wanted_by_name["up"]:
            self.d_up = new(given.up, dtype=dtype)

    def add(
        self,
        part: slice,
        *,
        gradient: Tensor,
        coefficients: Tensor,
        half_d_dots: Tensor,
        d_ups: Tensor | None,
    ) -> None:
        """Add those of the tokens ``part``.

        ``gradient`` is that of their output, ``half_d_dots`` half that of x·w, ``d_ups`` that of
        u·x; all have a row for each of these tokens.
        """
        added = int(part.start > 0)
        if self.d_dictionary is not None:
            mixed = coefficients.to(gradient.dtype)
            self.d_dictionary.addmm_(gradient.T, mixed, beta=added)
        if self.d_rows is not None:
            self.d_rows.addmm_(half_d_dots.T, self.x[part], beta=added, alpha=2)
        if self.d_x is not None:
            self.d_x[part].addmm_(half_d_dots, self.rows, beta=0, alpha=2)
        if d_ups is None or self.up is None:
            return
        if self.d_up is not None:
            self.d_up.addmm_(d_ups.T, self.x[part], beta=added)
        if self.d_x is not None:
            self.d_x[part].addmm_(d_ups, self.up)

    def add_distances(self, per_token: Tensor, per_row: Tensor) -> None:
        """Add what comes by way of ‖x‖² and ‖w‖².

        ``per_token`` (N, 1) and ``per_row`` (P,) are sums of −∂/∂‖x − w‖².
        """
        if self.d_x is not None:
            self.d_x.addcmul_(self.x, per_token, value=-2)
        if self.d_rows is not None:
            self.d_rows.addcmul_(self.rows, per_row[:, None], value=-2)
