"""SASRec (Kang & McAuley, ICDM 2018, arXiv 1808.09781): the baseline that every sequential recommender is held to.

Two forms, neither with an insertion point for cross-attention:

    SASRec          single-domain: an encoder a domain that sees the user's items of that domain only
    MixedSASRec     one encoder over the mixed sequence of both domains

    h_0 = sqrt(d) E[item] + P[recency]           dropout; positions count back from the newest event
    h   = TransformerEncoder(h_0)                causal self-attention and feed-forward, two layers
    score(item) = h . E[item]

The published loss is binary cross-entropy against one sampled negative; here negatives are shared by a batch, and the
cross-entropy averages over them. `objective="infonce"` puts ABXI's loss in its place.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from gcalib.attention import causal_mask
from gcalib.config import RunConfig
from gcalib.data.batches import Batch, Stream, rows_at
from gcalib.layers import Dropout, TransformerEncoder
from gcalib.models.base import Recommender, States, start_small

LAYERS = 2


class SASRec(Recommender):
    """Single-domain SASRec, one for each domain: what is known without the other domain."""

    needs_global_order: ClassVar = False
    encoders = 2

    def __init__(self, config: RunConfig, num_items: tuple[int, int]) -> None:
        super().__init__(config, num_items)
        d = config.dim
        self.item = nn.Embedding(1 + sum(num_items), d, padding_idx=0)
        self.position = nn.ModuleList(
            nn.Embedding(1 + self.window, d, padding_idx=0) for _ in range(self.encoders)
        )
        self.encoder = nn.ModuleList(
            TransformerEncoder(d, LAYERS, config.self_heads, config.dropout, config.hidden)
            for _ in range(self.encoders)
        )
        self.dropout = Dropout(config.dropout)
        self.apply(start_small)

    def encode(self, stream: Stream, number: int) -> Float[Tensor, "B L dim"]:
        """States of a stream's rows; zero, so that all items score alike, before the first item."""
        h = self.item(stream.items) * self.config.dim**0.5 + self.position[number](stream.recency)
        encoded: Tensor = self.encoder[number](self.dropout(h), stream.mask, causal_mask(stream.mask))
        return encoded

    def forward(self, batch: Batch) -> States:
        a, b = (self.encode(stream, number) for number, stream in enumerate(batch.domains))
        return (a, b) if batch.training else (batch.a.newest(a), batch.b.newest(b))


class MixedSASRec(SASRec):
    """SASRec over the mixed sequence: what a model gains from the other domain without being told of domains."""

    needs_global_order: ClassVar = True
    encoders = 1

    def forward(self, batch: Batch) -> States:
        h = self.encode(batch.mixed, 0)
        if not batch.training:
            return batch.mixed.newest(h), batch.mixed.newest(h)
        a, b = (rows_at(h, stream.query_position.clamp(min=0)) for stream in batch.domains)
        return a, b
