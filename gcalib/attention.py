"""Gated cross-attention (arXiv 2510.09435, section 3), what it may attend to, and a record of its activations.

    X'   = CA(X, Y)                     query X, key and value Y, multi-head
    gate = act(FFN([X ; Y]))            one value per feature, act = sigmoid or tanh
    out  = LayerNorm(X + gate * X')

B sequences, Lx queries and Ly keys, width dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gcalib.config import Gate, Update, divisors
from gcalib.interventions import ConstantGate, OfX, intervened
from gcalib.layers import Dropout, attend, merge_heads, split_heads


def visible(query_position: Int[Tensor, "B Lx"], position: Int[Tensor, "B Ly"]) -> Bool[Tensor, "B Lx Ly"]:
    """What each query may attend to without seeing the future: `position <= query_position`.

    `position` is the newest event that a key depends on, `query_position` the newest one that the prediction made from
    a query may depend on (`gcalib.data.batches`).

    Examples
    --------
    Five events a1 b1 b2 a2 b3, of which b3 is a target only. The rows a1 and a2 of domain A, from which a2 and the
    next A item after b3 are predicted, look at the rows b1 and b2 of domain B: a1 sees both, since b1 and b2 come
    before a2. In the other direction, b1 (which predicts b2) sees a1 only, and b2 (which predicts b3) sees a2 too.

    >>> a, b = torch.tensor([[0, 3]]), torch.tensor([[1, 2]])
    >>> a_query, b_query = torch.tensor([[2, 3]]), torch.tensor([[1, 3]])
    >>> visible(a_query, b).int().tolist(), visible(b_query, a).int().tolist()
    ([[[1, 1], [1, 1]]], [[[1, 0], [1, 1]]])
    """
    return position.unsqueeze(1) <= query_position.unsqueeze(2)


def causal_mask(mask: Bool[Tensor, "B L"]) -> Bool[Tensor, "B L L"]:
    """Self-attention: each row sees the real rows before it and itself."""
    columns = torch.arange(mask.size(1), device=mask.device)
    earlier = columns <= columns.unsqueeze(1)
    return (earlier & mask.unsqueeze(1)) | (columns == columns.unsqueeze(1))


def newest_visible(y: Float[Tensor, "B Ly dim"], mask: Bool[Tensor, "B Lx Ly"]) -> Float[Tensor, "B Lx dim"]:
    """For each query the last row of y that `mask` shows it, zero where it shows none: the Y of `FFN([X ; Y])`."""
    places = torch.arange(1, mask.size(2) + 1, device=mask.device)
    newest = (mask * places).amax(dim=2)  # 0: none
    padded = F.pad(y, (0, 0, 1, 0))
    return padded[torch.arange(y.size(0), device=y.device).unsqueeze(1), newest]


@dataclass(frozen=True)
class Activations:
    """What one gated cross-attention read and made in one forward pass; `update` is what it added to x.

    Outside `torch.no_grad()` they have gradients, for a loss that reads them.
    `y` is the row beside x in the gate's input, zero where there is none; `mask` is True at real queries; `updated` is
    True at those that saw a key (elsewhere x_prime is exactly zero); `attention` holds the weights if asked for.
    """

    name: str
    x: Float[Tensor, "B Lx dim"]
    y: Float[Tensor, "B Lx dim_y"]
    x_prime: Float[Tensor, "B Lx dim"]
    gate: Float[Tensor, "B Lx dim"]
    update: Float[Tensor, "B Lx dim"]
    out: Float[Tensor, "B Lx dim"]
    mask: Bool[Tensor, "B Lx"]
    updated: Bool[Tensor, "B Lx"]
    attention: Float[Tensor, "B heads Lx Ly"] | None


class CrossAttention(nn.Module):
    """Multi-head attention of queries X over keys and values Y (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(self, dim: int, heads: int, dim_y: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads={heads} does not divide dim={dim}; heads may be {divisors(dim)}.")
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim_y or dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "B Lx dim"], y: Float[Tensor, "B Ly dim_y"], mask: Bool[Tensor, "B Lx Ly"]
    ) -> Float[Tensor, "B Lx dim"]:
        """X', exactly zero for a query that `mask` shows no key."""
        q, k, v = self._heads(x, y)  # (B, h, L, p)
        sees = mask.any(dim=2, keepdim=True)
        # softmax over nothing is NaN: such queries attend to everything, and their result is erased
        x_prime = self.out(merge_heads(attend(q, k, v, mask | ~sees)))
        return self.dropout(x_prime) * sees

    @torch.no_grad()
    def weights(self, x: Tensor, y: Tensor, mask: Tensor) -> Float[Tensor, "B heads Lx Ly"]:
        """The attention weights, zero for a query that sees no key."""
        q, k, _ = self._heads(x, y)
        logits = (q @ k.transpose(2, 3)) * q.size(-1) ** -0.5
        return logits.masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(dim=-1).nan_to_num(0.0)

    def _heads(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(split_heads(t, self.heads) for t in (self.query(x), *self.key_value(y).chunk(2, dim=-1)))


class GatedCrossAttention(nn.Module):
    """`LayerNorm(x + gate * x_prime)`, `x_prime = CA(x, y)`, `gate = act(FFN([x ; y]))` (arXiv 2510.09435).

    The FFN has two layers with a ReLU between them, `dim + dim_y -> gate_hidden -> dim`.

    Parameters
    ----------
    dim
        Width of x.
    heads
        Heads of the cross-attention; must divide `dim`.
    gate
        `"sigmoid"` (0 to 1) or `"tanh"` (-1 to 1); for comparison `"constant"`, a learned number per feature in the
        place of the FFN, as in `x + alpha x_prime`, or `"none"`, always 1.
    dim_y
        Width of y; None is `dim`.
    gate_hidden
        Inner width of the FFN; None is `2 * (dim + dim_y)`, which gives the 16 dim^2 parameters that the paper's models
        grow by with a module (inferred from its figures, which do not state it).
    norm
        Whether there is a LayerNorm.
    update
        What is added to x: `"full"` is gate * x_prime; others are explained in `gcalib.interventions`.
    evaluation_only
        Whether an intervention spares training.
    dropout
        Rate at which features of x_prime are dropped in training.

    Raises
    ------
    ValueError
        For a head count that does not divide the width, or another gate.

    Examples
    --------
    >>> gca = GatedCrossAttention(dim=8, heads=2, dim_y=6)
    >>> gca(torch.randn(3, 5, 8), torch.randn(3, 7, 6), causal=True).shape
    torch.Size([3, 5, 8])
    """

    def __init__(
        self, dim: int, heads: int, gate: Gate = "sigmoid", *, dim_y: int | None = None,
        gate_hidden: int | None = None, norm: bool = True, dropout: float = 0.0,
        update: Update = "full", evaluation_only: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value, known in (("gate", gate, get_args(Gate)), ("update", update, get_args(Update))):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; it may be {', '.join(known)}.")
        self.dim, self.dim_y = dim, dim_y or dim
        self.name = "gca"
        self.update, self.evaluation_only = update, evaluation_only
        self.cross_attention: nn.Module = CrossAttention(dim, heads, self.dim_y, dropout)
        if update in ("linear", "ffn"):
            self.cross_attention = OfX(dim, nn.ReLU() if update == "ffn" else nn.Identity())
        self.gate: nn.Module = ConstantGate(dim, learned=gate == "constant")
        if gate in ("sigmoid", "tanh"):
            both, inner = dim + self.dim_y, gate_hidden or 2 * (dim + self.dim_y)
            self.gate = nn.Sequential(nn.Linear(both, inner), nn.ReLU(), nn.Linear(inner, dim))
        self.activation = {"sigmoid": nn.Sigmoid(), "tanh": nn.Tanh()}.get(gate, nn.Identity())
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.recording: tuple[list[Activations] | None, bool] = (None, False)

    def forward(
        self,
        x: Float[Tensor, "B Lx dim"],
        y: Float[Tensor, "B Ly dim_y"],
        *,
        query_mask: Bool[Tensor, "B Lx"] | None = None,
        key_mask: Bool[Tensor, "B Ly"] | None = None,
        causal: bool = False,
        mask: Bool[Tensor, "B Lx Ly"] | None = None,
    ) -> Float[Tensor, "B Lx dim"]:
        """Update x from y.

        Rows are counted back from each sequence's newest real row, wherever the pads stand: the n-th newest row of y
        is beside the n-th newest row of x in the gate's input (zeros where y has no such row).

        Parameters
        ----------
        query_mask, key_mask
            True at real rows; None for all. A query that is a pad, or sees no key, gets no update: its x_prime is
            exactly zero and the output there is `LayerNorm(x)`. So it is for all queries if y is empty.
        causal
            Hide the keys that are newer than the one beside the query: right where the n-th newest rows of x and y
            belong together, as two views of one sequence do. Between two domains use `mask`.
        mask
            What each query may see, such as `visible(query_position, position)`; the newest row that it shows is then
            beside the query.

        Raises
        ------
        ValueError
            If the shapes of x, y and the masks do not fit each other.
        """
        queries = torch.ones_like(x[..., 0], dtype=torch.bool) if query_mask is None else query_mask
        keys = torch.ones_like(y[..., 0], dtype=torch.bool) if key_mask is None else key_mask
        self._check(x, y, queries, keys, mask)
        if y.size(1) == 0:
            y, keys = F.pad(y, (0, 0, 0, 1)), F.pad(keys, (0, 1))
            mask = None if mask is None else F.pad(mask, (0, 1))
        real = queries.unsqueeze(2) & keys.unsqueeze(1)
        beside = real & (visible(-_age(queries), -_age(keys)) if mask is None else mask)
        mask = beside if causal or mask is not None else real
        y_beside_x = x if isinstance(self.cross_attention, OfX) else newest_visible(y, beside)

        x_prime = self.cross_attention(x, y, mask)
        gate = self.activation(self.gate(torch.cat([x, y_beside_x], dim=-1)))
        update = gate * x_prime
        if not (self.training and self.evaluation_only):
            update = intervened(self.update, x, update, self.training)
        out: Tensor = self.norm(x + update)

        recorded, with_weights = self.recording
        if recorded is not None:
            attends = with_weights and isinstance(self.cross_attention, CrossAttention)
            weights = self.cross_attention.weights(x, y, mask) if attends else None  # type: ignore[operator]
            made = (x, y_beside_x, x_prime, gate, update, out)
            recorded.append(Activations(self.name, *made, queries, mask.any(dim=2), weights))
        return out

    def _check(self, x: Tensor, y: Tensor, queries: Tensor, keys: Tensor, mask: Tensor | None) -> None:
        fits = x.dim() == y.dim() == 3 and x.size(0) == y.size(0)  # len(x) would fix the batch of an exported program
        if not fits or (x.size(2), y.size(2)) != (self.dim, self.dim_y):
            raise ValueError(
                f"x {tuple(x.shape)} and y {tuple(y.shape)} must be (batch, length, {self.dim}) and "
                f"(batch, length, {self.dim_y}) with the same batch."
            )
        B, Lx, Ly = x.size(0), x.size(1), y.size(1)
        for name, given, shape in (
            ("query_mask", queries, (B, Lx)), ("key_mask", keys, (B, Ly)), ("mask", mask, (B, Lx, Ly))
        ):  # fmt: skip
            if given is not None and (given.shape != shape or given.dtype != torch.bool):
                raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}; it must be torch.bool {shape}.")

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which do not record."""
        return {**self.__dict__, "recording": (None, False)}


def _age(mask: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """1 at the newest real row, 2 at the one before it, wherever the pads stand."""
    return mask.flip(1).cumsum(dim=1).flip(1)


@contextmanager
def record_activations(model: nn.Module, *, weights: bool = False) -> Iterator[list[Activations]]:
    """Collect the `Activations` of every gated cross-attention of `model` in each forward pass inside the block.

    Clear the list between batches to keep memory flat.

    Parameters
    ----------
    weights
        Record the attention weights too, which are computed a second time for it.
    """
    recorded: list[Activations] = []
    with _recording(model, recorded, weights):
        yield recorded


@contextmanager
def recording_paused(model: nn.Module) -> Iterator[None]:
    """Record nothing inside the block: passes over other sequences than those being studied."""
    with _recording(model, None, False):
        yield


@contextmanager
def _recording(model: nn.Module, recorded: list[Activations] | None, weights: bool) -> Iterator[None]:
    modules = [module for module in model.modules() if isinstance(module, GatedCrossAttention)]
    before = [module.recording for module in modules]
    for module in modules:
        module.recording = recorded, weights
    try:
        yield
    finally:
        for module, earlier in zip(modules, before, strict=True):
            module.recording = earlier
