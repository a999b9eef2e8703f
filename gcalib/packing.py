"""Packed rows: sequences of a batch as one tensor `(rows, dim)`, a row for each real position and none for padding.

Matrix products then never see a pad. Only attention needs the `(batch, length, dim)` form; a `Layout` knows how to go
there and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where packed rows stand in the padded form: `index[r] = sequence * length + place` of row r.

    Rows are left-aligned (pads come last), so a causal mask alone keeps real queries off the pads.
    """

    batch: int
    length: int
    index: Int[Tensor, " rows"]

    @classmethod
    def of(cls, sequence: Int[Tensor, " rows"], batch: int, *, from_right: bool = False) -> Layout:
        """Layout of rows that come sequence after sequence; `from_right` puts the pads first instead.

        Parameters
        ----------
        sequence
            Which sequence of the batch a row belongs to, ascending.
        """
        counts = torch.bincount(sequence, minlength=batch)
        length = max(int(counts.max()), 1) if len(sequence) else 1
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(sequence), device=sequence.device) - starts[sequence]
        if from_right:
            place = place + length - counts[sequence]
        return cls(batch, length, sequence * length + place)

    def pad(self, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "batch length dim"]:
        """Spread packed rows; pads are zero."""
        spread: Tensor = _Spread.apply(rows, self.index, self.batch * self.length)
        return spread.view(self.batch, self.length, -1)

    def unpad(self, padded: Float[Tensor, "batch length dim"]) -> Float[Tensor, "rows dim"]:
        """Back to packed rows; what stood on pads is dropped."""
        return take_rows(padded.reshape(self.batch * self.length, -1), self.index)

    def real(self) -> Bool[Tensor, "batch length"]:
        """True where a real position is."""
        mask = torch.zeros(self.batch * self.length, dtype=torch.bool, device=self.index.device)
        mask[self.index] = True
        return mask.view(self.batch, self.length)


class _Spread(torch.autograd.Function):
    """`zeros(size)[index] = rows`. Every index occurs once, so both directions are plain copies, no accumulation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        return rows.new_zeros(size, rows.shape[1]).index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


class _Take(torch.autograd.Function):
    """`table[index]` for an index without repeats: the gradient is copied, not accumulated."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = table.shape[0]
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, grad.shape[1]).index_copy_(0, index, grad), None


def take_rows(table: Float[Tensor, "size dim"], index: Int[Tensor, " rows"]) -> Float[Tensor, "rows dim"]:
    """`table[index]` where no index repeats (the caller's promise)."""
    taken: Tensor = _Take.apply(table, index)
    return taken


def spread_rows(rows: Float[Tensor, "rows dim"], index: Int[Tensor, " rows"], size: int) -> Float[Tensor, "size dim"]:
    """Zeros of `size` rows, with `rows` written at `index`, where no index repeats."""
    spread: Tensor = _Spread.apply(rows, index, size)
    return spread
