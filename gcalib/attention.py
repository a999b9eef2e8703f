"""Gated cross-attention (arXiv 2510.09435, section 3) and the taps through which it is studied.

    X'   = CA(X, Y)                     query X, key and value Y, multi-head
    gate = act(FFN([X ; Y]))            one value a feature, act = sigmoid or tanh
    out  = LayerNorm(X + gate * X')

`GatedCrossAttention(dim, heads)(x, y)` is the plain tensor form; models call `.rows`, the same on packed rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gcalib.config import divisors
from gcalib.layers import attend, merge_heads, split_heads
from gcalib.packing import Layout

Gate = Literal["sigmoid", "tanh"]


@dataclass(frozen=True)
class Tap:
    """What one gated cross-attention saw and made in one forward pass, detached, over its real query rows.

    `y` is the row that stands beside x in the gate's input (zero where there is none); `updated` is False for rows
    without a visible key, whose `x_prime` is exactly zero. `attention` holds the weights when they were asked for,
    left-aligned (pads last), as the module sees them; `padded` puts pads first.
    """

    name: str
    x: Float[Tensor, "rows dim"]
    y: Float[Tensor, "rows dim"]
    x_prime: Float[Tensor, "rows dim"]
    gate: Float[Tensor, "rows dim"]
    out: Float[Tensor, "rows dim"]
    updated: Bool[Tensor, " rows"]
    sequence: Int[Tensor, " rows"]
    batch: int
    attention: Float[Tensor, "batch heads length_x length_y"] | None

    def padded(self, values: Float[Tensor, "rows dim"]) -> Float[Tensor, "batch length dim"]:
        """One of the tap's tensors with the pads back in front, so that equal places are equally recent."""
        return Layout.of(self.sequence, self.batch, from_right=True).pad(values)

    def real(self) -> Bool[Tensor, "batch length"]:
        """Mask of real positions in the `padded` form."""
        return Layout.of(self.sequence, self.batch, from_right=True).real()


class CrossAttention(nn.Module):
    """Multi-head attention of queries X over keys and values Y.

    Raises
    ------
    ValueError
        If `heads` does not divide `dim`; the message lists the head counts that do.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads={heads} does not divide dim={dim}; heads may be {divisors(dim)}.")
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def rows(
        self,
        x: Float[Tensor, "rows_x dim"],
        y: Float[Tensor, "rows_y dim"],
        layout_x: Layout,
        layout_y: Layout,
        mask: Bool[Tensor, "batch length_x length_y"],
        *,
        weights: bool = False,
    ) -> tuple[Float[Tensor, "rows_x dim"], Bool[Tensor, " rows_x"], Tensor | None]:
        """Attend on packed rows.

        Returns
        -------
        x_prime
            Exactly zero for a row that `mask` shows no key.
        updated
            Whether the row was shown any.
        attention
            The weights `(batch, heads, length_x, length_y)` if `weights`, else None.
        """
        q = split_heads(layout_x.pad(self.query(x)), self.heads)
        k, v = (split_heads(t, self.heads) for t in layout_y.pad(self.key_value(y)).chunk(2, dim=-1))
        visible = mask.any(dim=2)
        # A softmax over nothing is NaN, and NaN times zero is NaN: let such rows see everything, then erase them.
        shown = (mask | ~visible.unsqueeze(2)).unsqueeze(1)
        attention = None
        if weights:
            logits = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
            attention = logits.detach().masked_fill(~shown, float("-inf")).softmax(dim=-1) * visible[:, None, :, None]
        heads = attend(q, k, v, shown)
        updated = visible.view(-1)[layout_x.index]
        x_prime = self.out(layout_x.unpad(merge_heads(heads)))
        return x_prime * updated.unsqueeze(1), updated, attention


class GatedCrossAttention(nn.Module):
    """`LayerNorm(x + gate * x_prime)`, `x_prime = CA(x, y)`, `gate = act(FFN([x ; y]))` (arXiv 2510.09435, eq. of GCA).

    The FFN has two layers, `2 dim -> dim -> dim`, with a ReLU between them.

    Parameters
    ----------
    dim
        Width of x and y.
    heads
        Heads of the cross-attention; must divide `dim`.
    gate
        `"sigmoid"` (0 to 1) or `"tanh"` (-1 to 1).

    Raises
    ------
    ValueError
        For a head count that does not divide the width, or another gate.
    """

    def __init__(self, dim: int, heads: int, gate: Gate = "sigmoid") -> None:
        super().__init__()
        if gate not in ("sigmoid", "tanh"):
            raise ValueError(f"gate={gate!r} is unknown; the gates are sigmoid and tanh.")
        self.dim = dim
        self.name = "gca"
        self.attention = CrossAttention(dim, heads)
        self.gate_ffn = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.gate_name = gate
        self.norm = nn.LayerNorm(dim)
        self._taps: list[Tap] | None = None
        self._tap_weights = False

    def forward(
        self,
        x: Float[Tensor, "batch length_x dim"],
        y: Float[Tensor, "batch length_y dim"],
        *,
        query_mask: Bool[Tensor, "batch length_x"] | None = None,
        key_mask: Bool[Tensor, "batch length_y"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "batch length_x dim"]:
        """Update x from y.

        Sequences are aligned at their newest ends: with unequal lengths, position i of x stands beside position
        `i + length_y - length_x` of y, both in the gate's input (zeros where y has no such or no real position)
        and in the causal form, where a query sees its own and earlier positions only.

        Parameters
        ----------
        query_mask, key_mask
            True at real positions; None for all. A query that is a pad, or sees no key, gets no update: its X' is
            exactly zero and the output is `LayerNorm(x)` there.
        causal
            Hide keys that are newer than the query.

        Raises
        ------
        ValueError
            If the shapes of x, y and the masks do not fit each other.
        """
        self._check(x, y, query_mask, key_mask)
        B, Lx, _ = x.size()
        Ly = y.size(1)
        queries = torch.ones(B, Lx, dtype=torch.bool, device=x.device) if query_mask is None else query_mask
        keys = torch.ones(B, Ly, dtype=torch.bool, device=x.device) if key_mask is None else key_mask
        beside = torch.arange(Lx, device=x.device) + Ly - Lx
        mask = queries.unsqueeze(2) & keys.unsqueeze(1)
        if causal:
            mask = mask & (torch.arange(Ly, device=x.device) <= beside.unsqueeze(1))
        exists = (beside >= 0) & keys[:, beside.clamp(min=0)]
        partner = y[:, beside.clamp(min=0)] * exists.unsqueeze(2)
        sequence_x = torch.arange(B, device=x.device).repeat_interleave(Lx)
        layout_x = Layout(B, Lx, torch.arange(B * Lx, device=x.device))
        layout_y = Layout(B, Ly, torch.arange(B * Ly, device=x.device))
        out = self.rows(
            x.reshape(B * Lx, -1), y.reshape(B * Ly, -1), partner.reshape(B * Lx, -1), layout_x, layout_y, mask,
            sequence=sequence_x, real=queries.reshape(-1),
        )  # fmt: skip
        return out.view(B, Lx, -1)

    def rows(
        self,
        x: Float[Tensor, "rows_x dim"],
        y: Float[Tensor, "rows_y dim"],
        partner: Float[Tensor, "rows_x dim"],
        layout_x: Layout,
        layout_y: Layout,
        mask: Bool[Tensor, "batch length_x length_y"],
        *,
        sequence: Int[Tensor, " rows_x"],
        real: Bool[Tensor, " rows_x"] | None = None,
    ) -> Float[Tensor, "rows_x dim"]:
        """The same on packed rows: `partner` is the row of y beside each row of x, zero where there is none."""
        x_prime, updated, attention = self.attention.rows(x, y, layout_x, layout_y, mask, weights=self._tap_weights)
        gate = self.activation(self.gate_ffn(torch.cat([x, partner], dim=1)))
        out: Tensor = self.norm(x + gate * x_prime)
        if self._taps is not None:
            kept = slice(None) if real is None else real
            x, partner, x_prime, gate = (t.detach()[kept] for t in (x, partner, x_prime, gate))
            self._taps.append(
                Tap(
                    self.name, x, partner, x_prime, gate, out.detach()[kept], updated[kept], sequence[kept],
                    layout_x.batch, attention,
                )
            )  # fmt: skip
        return out

    def activation(self, logits: Tensor) -> Tensor:
        """The gate's non-linearity."""
        return logits.sigmoid() if self.gate_name == "sigmoid" else logits.tanh()

    def _check(self, x: Tensor, y: Tensor, query_mask: Tensor | None, key_mask: Tensor | None) -> None:
        fits = x.dim() == y.dim() == 3 and len(x) == len(y) and x.size(2) == y.size(2) == self.dim
        if not fits or not x.numel() or not y.numel():
            raise ValueError(
                f"x {tuple(x.shape)} and y {tuple(y.shape)} must be (batch, length, {self.dim}) with the same batch, "
                "neither empty."
            )
        for name, mask, of in (("query_mask", query_mask, x), ("key_mask", key_mask, y)):
            if mask is not None and (mask.shape != of.shape[:2] or mask.dtype != torch.bool):
                raise ValueError(
                    f"{name} is {mask.dtype} {tuple(mask.shape)}; it must be torch.bool {tuple(of.shape[:2])}."
                )


@contextmanager
def tapping(model: nn.Module, *, weights: bool = False) -> Iterator[list[Tap]]:
    """Collect a `Tap` from every gated cross-attention of `model` in each forward pass inside the block.

    The measurements read tensors that the pass makes anyway, so no second pass is needed. Clear the list between
    batches to keep memory flat.

    Parameters
    ----------
    weights
        Collect the attention weights too (they are computed beside the fused attention, at its cost again).
    """
    taps: list[Tap] = []
    modules = [module for module in model.modules() if isinstance(module, GatedCrossAttention)]
    for module in modules:
        module._taps, module._tap_weights = taps, weights
    try:
        yield taps
    finally:
        for module in modules:
            module._taps, module._tap_weights = None, False


@contextmanager
def untapped(model: nn.Module) -> Iterator[None]:
    """Keep what passes inside the block out of `tapping`: passes over other sequences than those being measured."""
    modules = [module for module in model.modules() if isinstance(module, GatedCrossAttention)]
    kept = [module._taps for module in modules]
    for module in modules:
        module._taps = None
    try:
        yield
    finally:
        for module, taps in zip(modules, kept, strict=True):
            module._taps = taps


def newest_visible(
    y: Float[Tensor, "rows_y dim"], layout_y: Layout, mask: Bool[Tensor, "batch length_x length_y"], layout_x: Layout
) -> Float[Tensor, "rows_x dim"]:
    """For each query row, the last row of y that `mask` shows it, zero where it shows none.

    The paper writes `FFN([X_A ; X_B])` for streams aligned position by position; on packed streams of their own
    lengths this is what stands beside a query.
    """
    places = torch.arange(1, layout_y.length + 1, device=y.device)
    newest = (mask * places).amax(dim=2) - 1
    flat = newest + layout_y.length * torch.arange(layout_y.batch, device=y.device).unsqueeze(1)
    place_of_row = torch.full((layout_y.batch * layout_y.length,), -1, device=y.device)
    place_of_row[layout_y.index] = torch.arange(len(layout_y.index), device=y.device)
    row = place_of_row[flat.clamp(min=0)].masked_fill(newest < 0, -1).view(-1)[layout_x.index]
    # one zero row at the end, which index -1 finds
    return torch.cat([y, y.new_zeros(1, y.shape[1])])[row]

