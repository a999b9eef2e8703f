"""The comparator: ABXI as it is ordinarily written, with the parameters of ours.

Every stream is padded to the model's window; attention, feed-forward, dropout and norms run over the pads; each
position draws negatives of its own, and their vectors are gathered into one tensor (batch, window, 1 + negatives, dim).
Modules and functions are torch's own. `tests/test_benchmark.py` shows that states and losses are those of
`gcalib.models.ABXI`, so that the benchmark compares two ways to one result.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcalib.config import RunConfig
from gcalib.data.batches import Batch, Stream
from gcalib.layers import LoRA, SwiGLU
from gcalib.models.abxi import ABXI


@dataclass(frozen=True)
class Padded:
    """A training batch in padded form, pads in front; streams in the order mixed, A, B.

    `items`, `position`, `seen` are (3, batch, window), `targets` is (batch, window), 0 where nothing is predicted.
    `seen` is the column of the event that a row holds.
    """

    items: Tensor
    position: Tensor
    seen: Tensor
    targets: Tensor


def pad_batch(batch: Batch, window: int) -> Padded:
    """The padded form of a packed training batch: slot s of a user stands `slots - s` columns from the right."""
    front = window - torch.bincount(batch.mixed.sequence, minlength=batch.size)

    def spread(sequence: Tensor, slot: Tensor, values: Tensor) -> Tensor:
        return torch.zeros(batch.size, window, dtype=torch.int64).index_put((sequence, front[sequence] + slot), values)

    def of_streams(name: str) -> Tensor:
        streams: tuple[Stream, ...] = (batch.mixed, *batch.own)
        return torch.stack([spread(s.sequence, s.slot, getattr(s, name)) for s in streams])

    real = of_streams("items") > 0
    targets = sum(spread(q.sequence, q.slot, q.targets) for q in batch.queries)
    return Padded(of_streams("items"), of_streams("position"), of_streams("seen") + front.unsqueeze(1) * real, targets)


def draw_for_each_position(batch: Padded, num_items: tuple[int, int], count: int = 256) -> Tensor:
    """Item ids (batch, window, count): negatives of each position, half from each domain."""
    nA, nB = num_items
    shape = (*batch.targets.shape, count // 2)
    return torch.cat([torch.randint(1, 1 + nA, shape), torch.randint(1 + nA, 1 + nA + nB, shape)], dim=2)


class PaddedABXI(nn.Module):
    """ABXI without cross-attention or with it at point 0, on padded streams.

    Parameters
    ----------
    model
        Ours; its parameters are copied.
    config
        The config that `model` was made of.
    """

    def __init__(self, model: ABXI, config: RunConfig) -> None:
        super().__init__()
        if set(config.gca) - {0}:
            raise ValueError(f"gca={config.gca}: the padded comparator knows cross-attention at point 0 only.")
        self.parts = copy.deepcopy(model)
        with torch.no_grad():  # a pad is a zero vector; packed rows never look at row 0
            self.parts.item.weight[0] = 0
            self.parts.position.weight[0] = 0
        self.dropout = nn.Dropout(config.dropout)
        self.as_published, self.temperature, self.gca = config.as_published, config.temperature, config.gca
        packed = self.parts.attention
        self.attention = nn.MultiheadAttention(config.dim, config.self_heads, batch_first=True)
        self.attention.in_proj_weight, self.attention.in_proj_bias = (
            packed.query_key_value.weight, packed.query_key_value.bias,
        )  # fmt: skip
        self.attention.out_proj = packed.out

    def forward(self, batch: Padded) -> tuple[Tensor, Tensor]:
        """States (batch, window, dim) that predict in A and in B."""
        parts, real = self.parts, (batch.items > 0).unsqueeze(3)
        h = self.dropout(parts.item(batch.items) + parts.position(batch.position))
        if 0 in self.gca:
            a = self._cross(parts.gca["0a"], h[1], h[2], batch.seen[2], real[1], real[2])
            b = self._cross(parts.gca["0b"], h[2], h[1], batch.seen[1], real[2], real[1])
            h = torch.stack([h[0], a, b])
        encoded = []
        for s, stream, is_real in zip("xab", h, real, strict=True):
            stream = parts.attention_norm(stream + self.dropout(self._attend(stream, is_real)))
            fed, adapted = swiglu(parts.ffn, stream), lora(parts.lora[s], stream)
            encoded.append(parts.ffn_norm[s](stream + self.dropout(fed) + self.dropout(adapted)) * is_real)
        x = encoded[0]
        h_i = swiglu(parts.invariant, x)
        states = []
        for s, own in zip("ab", encoded[1:], strict=True):
            adapted = lora(parts.invariant_lora[s], x)
            shared = parts.invariant_norm[s](x + self.dropout(h_i) + self.dropout(adapted))
            states.append(shared + parts.own_norm[s](own + self.dropout(swiglu(parts.own[s], own))))
        return states[0], states[1]

    def loss(self, batch: Padded, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """InfoNCE of both domains; `negatives` (batch, window, n) holds item ids for each position."""
        in_b = batch.targets > self.parts.num_items[0]
        state_a, state_b = self(batch)
        state = torch.where(in_b.unsqueeze(2), state_b, state_a)
        candidates = self.parts.item(torch.cat([batch.targets.unsqueeze(2), negatives], dim=2))
        logits = torch.einsum("bld,blnd->bln", state, candidates) / self.temperature
        position_loss = F.cross_entropy(
            logits.flatten(0, 1).float() if logits.dtype == torch.bfloat16 else logits.flatten(0, 1),
            torch.zeros(batch.targets.numel(), dtype=torch.int64), reduction="none",
        ).view(batch.targets.shape)  # fmt: skip
        losses = []
        for mine in ((batch.targets > 0) & ~in_b, in_b):
            losses.append(((position_loss * mine).sum(dim=1) / mine.sum(dim=1).clamp(min=1)).mean())
        return losses[0], losses[1]

    def _attend(self, h: Tensor, real: Tensor) -> Tensor:
        """Causal self-attention; pads are keys too in the published form, else visible to themselves only."""
        B, L, _ = h.size()
        hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
        if self.as_published:
            return self.attention(h, h, h, attn_mask=hidden, is_causal=True, need_weights=False)[0]
        hidden = hidden | ~(real.view(B, 1, L) | torch.eye(L, dtype=torch.bool))
        mask = hidden.repeat_interleave(self.attention.num_heads, dim=0)
        return self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]

    def _cross(self, gca: nn.Module, x: Tensor, y: Tensor, seen: Tensor, real_x: Tensor, real_y: Tensor) -> Tensor:
        """Gated cross-attention of x to the rows of y that hold nothing newer than x's column."""
        B, L, d = x.size()
        shown = real_x & (real_y & (seen.unsqueeze(2) <= torch.arange(L))).transpose(1, 2)
        some = shown.any(dim=2, keepdim=True)
        heads = gca.attention.heads
        q, k, v = (
            t.view(B, L, heads, d // heads).transpose(1, 2)
            for t in (gca.attention.query(x), *gca.attention.key_value(y).chunk(2, dim=2))
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=(shown | ~some).unsqueeze(1))
        x_prime = gca.attention.out(attended.transpose(1, 2).reshape(B, L, d)) * some
        newest = (shown * torch.arange(L)).argmax(dim=2, keepdim=True)
        partner = y.gather(1, newest.expand(B, L, d)) * some
        gate = gca.activation(gca.gate_ffn(torch.cat([x, partner], dim=2)))
        return gca.norm(x + gate * x_prime) * real_x


def swiglu(module: SwiGLU, x: Tensor) -> Tensor:
    """SwiGLU in plain torch."""
    return module.outer(F.silu(module.gate(x)) * module.inner(x))


def lora(module: LoRA, x: Tensor) -> Tensor:
    """LoRA in plain torch."""
    return x @ module.B.T @ module.A.T
