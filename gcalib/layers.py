"""The parts that the models share: cheap dropout, self-attention over packed rows, SwiGLU, LoRA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gcalib.packing import Layout


class Dropout(nn.Module):
    """Dropout whose mask costs a byte of randomness an element, some ten times cheaper than torch's on a CPU.

    An element is kept when its random byte reaches a threshold, so the rate is a multiple of 1/256 (0.5 is exact);
    survivors are scaled by the inverse of the rate really used, so the expectation is exact for every rate.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.threshold = min(255, round(256 * rate))  # something is always kept

    def forward(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        if not self.training or self.threshold == 0:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
        # the full range of int64: eight uniform bytes a word
        words.random_(-(2**63), None)
        noise = words.view(torch.uint8)[: x.numel()].view(x.shape)
        keep = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.ge(noise, self.threshold, out=keep)
        return x * keep.mul_(256 / (256 - self.threshold))

    def extra_repr(self) -> str:
        return f"rate={self.threshold}/256"


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

    def forward(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        gated: Tensor = _SiluTimes.apply(self.gate(x), self.inner(x))
        return self.outer(gated)


class _SiluTimes(torch.autograd.Function):
    """`silu(g) * u`, keeping only g and u for the backward pass and walking memory as few times as torch allows."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        g, u = ctx.saved_tensors
        grad_g = torch.ops.aten.silu_backward(grad * u, g)
        return grad_g, F.silu(g).mul_(grad)


class LoRA(nn.Module):
    """Low-rank update `x B^T A^T` (Hu et al. 2021, arXiv 2106.09685), zero at the start because B is."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(dim, rank) * 0.02)
        self.B = nn.Parameter(torch.zeros(rank, dim))

    def forward(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        return F.linear(F.linear(x, self.B), self.A)


def split_heads(x: Float[Tensor, "batch length dim"], heads: int) -> Float[Tensor, "batch heads length per_head"]:
    """`(B, L, d)` to `(B, h, L, d / h)`, the form attention works on."""
    B, L, d = x.size()
    return x.view(B, L, heads, d // heads).transpose(1, 2)


def merge_heads(x: Float[Tensor, "batch heads length per_head"]) -> Float[Tensor, "batch length dim"]:
    """The inverse of `split_heads`."""
    B, h, L, p = x.size()
    return x.transpose(1, 2).reshape(B, L, h * p)


def attend(
    q: Float[Tensor, "batch heads length_q per_head"],
    k: Float[Tensor, "batch heads length_k per_head"],
    v: Float[Tensor, "batch heads length_k per_head"],
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads length_q per_head"]:
    """`softmax(q k^T / sqrt(p)) v`; on a CPU in float32 even under bf16 autocast, where the bf16 gradient is slower.

    `dropout` is the rate at which weights of the softmax are dropped.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    with torch.autocast("cpu", enabled=False):
        if q.dtype == torch.bfloat16:
            q, k, v = q.float(), k.float(), v.float()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


class SelfAttention(nn.Module):
    """Causal multi-head self-attention of packed streams, with weights shared by all streams given together."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        rows: Float[Tensor, "rows dim"],
        layouts: list[Layout],
        pads: list[Int[Tensor, " stream_rows"]] | None = None,
    ) -> Float[Tensor, "rows dim"]:
        """Attend within each stream, each row to itself and the rows before it.

        Parameters
        ----------
        rows
            The rows of all streams, one stream after the other, as `layouts` lists them.
        pads
            For each row, how many pads it sees beside the real rows; None for none. Official ABXI masks no pads:
            each is a zero vector whose key and value are the projections' biases. All pads being equal, n of them
            weigh as much as a single one whose logit is raised by log n, which is what is done here.
        """
        packed = self.query_key_value(rows)
        attended = []
        start = 0
        for stream, layout in enumerate(layouts):
            part = packed[start : start + len(layout.index)]
            start += len(layout.index)
            q, k, v = (split_heads(t, self.heads) for t in layout.pad(part).chunk(3, dim=-1))
            if pads is None:
                heads = attend(q, k, v, causal=True)
            else:
                heads = self._beside_pads(q, k, v, layout, pads[stream])
            attended.append(layout.unpad(merge_heads(heads)))
        return self.out(torch.cat(attended))

    def _beside_pads(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, pads: Tensor) -> Tensor:
        B, h, L, p = q.size()
        _, key_of_pad, value_of_pad = self.query_key_value.bias.to(k.dtype).view(3, 1, h, 1, p)
        k = torch.cat([key_of_pad.expand(B, h, 1, p), k], dim=2)
        v = torch.cat([value_of_pad.expand(B, h, 1, p), v], dim=2)
        real = torch.float64 if q.dtype == torch.float64 else torch.float32
        log_count = torch.zeros(B * L, dtype=real, device=q.device).index_copy_(0, layout.index, pads.to(real).log())
        causal = torch.full((L, L), float("-inf"), dtype=real, device=q.device).triu_(1).expand(B, L, L)
        bias = torch.cat([log_count.view(B, L, 1), causal], dim=2).unsqueeze(1)
        return attend(q, k, v, bias if q.device.type == "cpu" else bias.to(q.dtype))


class TransformerEncoder(nn.Module):
    """The sequence encoder of SASRec (Kang & McAuley, ICDM 2018, arXiv 1808.09781) on packed rows.

    Each layer normalises the queries only, adds them (not the layer's input) to what attention found, and then adds
    a two-layer ReLU network of the normalised sum, as the official code does:

        q = LayerNorm(x);  x = q + Attention(q, x, x);  x = LayerNorm(x);  x = x + FFN(x)

    and a last LayerNorm follows. `eps` is the official 1e-8. The official encoder also drops attention weights in
    training; ours does if `drop_attention`, which on a CPU goes without the fused kernel.

    Parameters
    ----------
    hidden
        Inner width of the feed-forward layers; None is `dim`, as published.
    drop_attention
        Whether attention weights are dropped in training, at the rate `dropout` of the feed-forward layers.
    """

    def __init__(
        self, dim: int, layers: int, heads: int, dropout: float, hidden: int | None = None, drop_attention: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.attention_rate = dropout if drop_attention else 0.0
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "query_norm": nn.LayerNorm(dim, eps=1e-8),
                    "query": nn.Linear(dim, dim),
                    "key_value": nn.Linear(dim, 2 * dim),
                    "out": nn.Linear(dim, dim),
                    "ffn_norm": nn.LayerNorm(dim, eps=1e-8),
                    "inner": nn.Linear(dim, hidden or dim),
                    "outer": nn.Linear(hidden or dim, dim),
                }
            )
            for _ in range(layers)
        )
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(dim, eps=1e-8)

    def forward(
        self, x: Float[Tensor, "rows dim"], layout: Layout, *, published_length: int | None = None
    ) -> Float[Tensor, "rows dim"]:
        """Encode one stream, each row from itself and the rows before it.

        Parameters
        ----------
        published_length
            Not so, but as the official LLM4CDSR does it: each row from all rows of its sequence, those after it
            among them, and from the pads that fill the sequence up to this length.
        """
        shown = None if published_length is None else _pads_and_rows(layout, published_length, x.dtype)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            query = layer["query_norm"](x)
            k, v = (split_heads(t, self.heads) for t in layout.pad(layer["key_value"](x)).chunk(2, dim=-1))
            q = split_heads(layout.pad(layer["query"](query)), self.heads)
            if shown is not None:
                # a pad is a row of zeros, so that its key and value are the projections' biases
                bias: Tensor = layer["key_value"].get_parameter("bias")
                pad = bias.to(k.dtype).expand(layout.batch, 1, -1).chunk(2, dim=-1)
                k, v = (torch.cat([split_heads(p, self.heads), t], dim=2) for p, t in zip(pad, (k, v), strict=True))
            rate = self.attention_rate if self.training else 0.0
            heads = attend(q, k, v, shown, causal=shown is None, dropout=rate)
            attended = layout.unpad(merge_heads(heads))
            x = layer["ffn_norm"](query + layer["out"](attended))
            x = x + self.dropout(layer["outer"](self.dropout(F.relu(layer["inner"](x)))))
        normed: Tensor = self.norm(x)
        return normed


def _pads_and_rows(layout: Layout, length: int, dtype: torch.dtype) -> Float[Tensor, "batch 1 1 keys"]:
    """What is added to the logits of one pad and of all rows: n equal pads weigh as one whose logit has log n more."""
    real = layout.real()
    of_rows = torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill_(~real, float("-inf"))
    of_pad = (length - real.sum(dim=1, keepdim=True)).to(dtype).log()
    return torch.cat([of_pad, of_rows], dim=1)[:, None, None]
