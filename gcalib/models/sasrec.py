"""SASRec (Kang & McAuley, ICDM 2018, arXiv 1808.09781): the yardstick that every sequential recommender is held to.

Two forms, neither with a place for cross-attention:

    SASRec          single-domain: an encoder a domain that sees the user's items of that domain only
    MixedSASRec     one encoder over the mixed sequence of both domains

    h_0 = sqrt(d) E[item] + P[position]          dropout; positions count back from the newest event
    h   = TransformerEncoder(h_0)                causal self-attention and feed-forward, two layers
    score(item) = h . E[item]

The published loss is binary cross-entropy against one sampled negative; `objective="infonce"` puts ABXI's loss in its
place, which makes the two comparable. Negatives are shared by a batch in both; the cross-entropy
averages over them.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from gcalib.config import RunConfig
from gcalib.data.batches import Batch, Stream
from gcalib.layers import Dropout, TransformerEncoder
from gcalib.models.base import Recommender, next_item_losses, start_small
from gcalib.packing import spread_rows, take_rows

LAYERS = 2


class _SASRec(Recommender):
    """What the two forms share: embeddings, scores, losses."""

    def __init__(self, config: RunConfig, num_items: tuple[int, int], encoders: int) -> None:
        super().__init__()
        d = config.dim
        self.num_items = num_items
        self.window = config.max_length - 3
        self.num_negatives = config.negatives
        self.negative_groups = config.negative_groups
        self.own_negatives = config.own_negatives
        self.temperature = config.temperature
        self.objective = config.objective
        self.item = nn.Embedding(1 + sum(num_items), d, padding_idx=0)
        self.position = nn.ModuleList(nn.Embedding(1 + self.window, d, padding_idx=0) for _ in range(encoders))
        self.encoder = nn.ModuleList(
            TransformerEncoder(
                d, config.layers or LAYERS, config.self_heads, config.dropout, config.hidden, config.attention_dropout
            )
            for _ in range(encoders)
        )
        self.dropout = Dropout(config.dropout)
        self.apply(start_small)

    def encode(self, stream: Stream, number: int) -> Float[Tensor, "rows dim"]:
        """States of a stream's rows."""
        h = self.item(stream.items) * self.item.embedding_dim**0.5 + self.position[number](stream.position)
        encoded: Tensor = self.encoder[number](self.dropout(h), stream.layout)
        return encoded

    def loss(self, batch: Batch, negatives: Tensor) -> dict[str, Tensor]:
        return next_item_losses(
            self(batch), batch, negatives, self.item, num_items_a=self.num_items[0], objective=self.objective,
            temperature=self.temperature, spared=self.spared(batch),
        )  # fmt: skip


class SASRec(_SASRec):
    """Single-domain SASRec, one for each domain: what is known without the other domain."""

    needs_clock: ClassVar = False

    def __init__(self, config: RunConfig, num_items: tuple[int, int]) -> None:
        super().__init__(config, num_items, encoders=2)

    def forward(self, batch: Batch) -> tuple[Float[Tensor, "queries_a dim"], Float[Tensor, "queries_b dim"]]:
        states = []
        for number, (stream, queries) in enumerate(zip(batch.own, batch.queries, strict=True)):
            asked = queries if self.training else queries.newest()
            has = asked.own_row >= 0
            rows = take_rows(self.encode(stream, number), asked.own_row[has])
            # before the user's first item of the domain nothing is known: all items score zero
            states.append(spread_rows(rows, has.nonzero().squeeze(1), len(has)))
        return states[0], states[1]


class MixedSASRec(_SASRec):
    """SASRec over the mixed sequence: what a model gains from the other domain without being told of domains."""

    def __init__(self, config: RunConfig, num_items: tuple[int, int]) -> None:
        super().__init__(config, num_items, encoders=1)

    def forward(self, batch: Batch) -> tuple[Float[Tensor, "queries_a dim"], Float[Tensor, "queries_b dim"]]:
        h = self.encode(batch.mixed, 0)
        asked = [queries if self.training else queries.newest() for queries in batch.queries]
        return take_rows(h, asked[0].mixed_row), take_rows(h, asked[1].mixed_row)
