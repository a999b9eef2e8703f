"""The parts that the models share: attention, the SASRec encoder, SwiGLU, LoRA, dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Dropout(nn.Module):
    """Dropout whose mask costs a byte of randomness per element, some ten times cheaper than torch's on a CPU.

    An element is kept when its random byte reaches a threshold, so the rate is a multiple of 1/256 (0.5 is exact);
    kept elements are scaled by the inverse of the rate really used, so the expectation is exact for every rate.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.threshold = min(255, round(256 * rate))  # something is always kept

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.threshold == 0:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None)  # the full range of int64: eight uniform bytes a word
        noise = words.view(torch.uint8)[: x.numel()].view(x.shape)
        keep = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.ge(noise, self.threshold, out=keep)
        return x * keep.mul_(256 / (256 - self.threshold))

    def extra_repr(self) -> str:
        return f"rate={self.threshold}/256"


def real_rows(x: Float[Tensor, "B L dim"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "rows dim"]:
    """`x[mask]` as a lookup, whose gradient is several times faster on a CPU."""
    return F.embedding(mask.flatten().nonzero().squeeze(1), x.flatten(0, 1))


def padded(rows: Float[Tensor, "rows dim"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L dim"]:
    """The inverse of `real_rows`, zero at pads."""
    real = mask.flatten()
    place = real.cumsum(0) * real  # 0 finds the row of zeros in front
    return F.embedding(place, F.pad(rows, (0, 0, 1, 0)), padding_idx=0).view(*mask.shape, -1)


class SwiGLU(nn.Module):
    """`w_out(silu(w_gate x) * w_in x)`, without biases (Shazeer 2020, arXiv 2002.05202).

    The inner width defaults to `8 round(d / 3)`: 680 at d = 256, as in ABXI's official code.
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or 8 * round(dim / 3)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.inner = nn.Linear(dim, hidden, bias=False)
        self.outer = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        gated: Tensor = self.outer(F.silu(self.gate(x)) * self.inner(x))
        return gated


class LoRA(nn.Module):
    """Low-rank update `x B^T A^T` (Hu et al. 2021, arXiv 2106.09685), zero at the start because B is."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(dim, rank) * 0.02)
        self.B = nn.Parameter(torch.zeros(rank, dim))

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return F.linear(F.linear(x, self.B), self.A)


def split_heads(x: Float[Tensor, "B L dim"], heads: int) -> Float[Tensor, "B heads L per_head"]:
    """`(B, L, d)` to `(B, h, L, d / h)`, the form attention works on."""
    B, L, d = x.size()
    return x.view(B, L, heads, d // heads).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B heads L per_head"]) -> Float[Tensor, "B L dim"]:
    """The inverse of `split_heads`."""
    B, h, L, p = x.size()
    return x.transpose(1, 2).reshape(B, L, h * p)


def attend(
    q: Float[Tensor, "B heads Lq per_head"],
    k: Float[Tensor, "B heads Lk per_head"],
    v: Float[Tensor, "B heads Lk per_head"],
    mask: Bool[Tensor, "B Lq Lk"] | Float[Tensor, "B Lq Lk"],
) -> Float[Tensor, "B heads Lq per_head"]:
    """`softmax(q k^T / sqrt(p)) v` where `mask` is True, or with `mask` added to the logits.

    On a CPU in float32 even under bf16 autocast, where the bf16 gradient is slower.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        if mask.is_floating_point():
            mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
    with torch.autocast("cpu", enabled=False):
        return attend(q.float(), k.float(), v.float(), mask).to(q.dtype)


def with_pads(
    k: Float[Tensor, "B heads Lk per_head"],
    v: Float[Tensor, "B heads Lk per_head"],
    bias: Float[Tensor, " two_dim"],
    mask: Bool[Tensor, "B Lq Lk"],
    pads: Int[Tensor, "B Lq"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and logit biases of official code, which attends to pads as well.

    A pad is a row of zeros, so its key and value are the projections' biases. n equal pads weigh as much as one whose
    logit is raised by log n, which is put in front.
    """
    B, h, _, p = k.size()
    key, value = bias.to(k.dtype).view(2, 1, h, 1, p).expand(2, B, h, 1, p)
    logits = torch.zeros(mask.shape, dtype=k.dtype, device=k.device).masked_fill_(~mask, float("-inf"))
    of_pad = pads.to(k.dtype).log().unsqueeze(2)
    return torch.cat([key, k], dim=2), torch.cat([value, v], dim=2), torch.cat([of_pad, logits], dim=2)


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    Parameters of `forward`: `mask` (B, L, L) is True where a row may attend; `pads` (B, L) is how many pads each row
    sees in official code, None for none.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "B L dim"], mask: Bool[Tensor, "B L L"], pads: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L dim"]:
        q, k, v = (split_heads(t, self.heads) for t in self.query_key_value(x).chunk(3, dim=-1))  # (B, h, L, p)
        if pads is not None:
            k, v, mask = with_pads(k, v, self.query_key_value.bias[x.size(2) :], mask, pads)
        attended: Tensor = self.out(merge_heads(attend(q, k, v, mask)))
        return attended


def attend_rows(
    query: Float[Tensor, "rows dim"],
    key_value: Float[Tensor, "rows two_dim"],
    real: Bool[Tensor, "B L"],
    mask: Bool[Tensor, "B L L"],
    heads: int,
    pads: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "rows dim"]:
    """Self-attention of the real rows, which stand between pads only for it.

    `pads` are the bias of the key and value projections and the number of pads each row sees (see `with_pads`).
    """
    qkv = padded(torch.cat([query, key_value], dim=1), real)
    q, k, v = (split_heads(t, heads) for t in qkv.chunk(3, dim=-1))  # (B, h, L, p)
    if pads is not None:
        k, v, mask = with_pads(k, v, pads[0], mask, pads[1])
    return real_rows(merge_heads(attend(q, k, v, mask)), real)


class EncoderLayer(nn.Module):
    """One layer of SASRec's encoder on the real rows; see `TransformerEncoder`."""

    def __init__(self, dim: int, heads: int, dropout: float, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm = nn.LayerNorm(dim, eps=1e-8)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-8)
        self.inner = nn.Linear(dim, hidden)
        self.outer = nn.Linear(hidden, dim)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "rows dim"], real: Bool[Tensor, "B L"], mask: Bool[Tensor, "B L L"], pads: Tensor | None
    ) -> Float[Tensor, "rows dim"]:
        normed = self.query_norm(x)
        seen = None if pads is None else (self.key_value.bias, pads)
        attended = attend_rows(self.query(normed), self.key_value(x), real, mask, self.heads, seen)
        x = self.ffn_norm(normed + self.out(attended))
        return x + self.dropout(self.outer(self.dropout(F.relu(self.inner(x)))))


class TransformerEncoder(nn.Module):
    """The sequence encoder of SASRec (Kang & McAuley, ICDM 2018, arXiv 1808.09781).

    Each layer normalises the queries only, adds them (not the layer's input) to what attention found, and then adds
    a two-layer ReLU network of the normalised sum, as the official code does:

        q = LayerNorm(x);  x = q + Attention(q, x, x);  x = LayerNorm(x);  x = x + FFN(x)

    and a last LayerNorm follows. `eps` is the official 1e-8. The official encoder also drops attention weights.
    `hidden` is the inner width of the feed-forward layers; None is `dim`, as published.

    A domain's stream has 1.4 times as many rows with pads: what works row by row leaves them out.
    """

    def __init__(self, dim: int, layers: int, heads: int, dropout: float, hidden: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, dropout, hidden or dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-8)

    def forward(
        self,
        x: Float[Tensor, "B L dim"],
        real: Bool[Tensor, "B L"],
        mask: Bool[Tensor, "B L L"],
        pads: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L dim"]:
        """Encode the rows that are `real`, zero elsewhere; `mask` and `pads` as in `SelfAttention`."""
        rows = real_rows(x, real)
        for layer in self.layers:
            rows = layer(rows, real, mask, pads)
        return padded(self.norm(rows), real)
