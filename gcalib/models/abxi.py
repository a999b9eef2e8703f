"""ABXI: invariant interest adaptation for cross-domain sequential recommendation (WWW 2025, arXiv 2501.15118).

Three streams, the mixed one x and one a domain, pass a shared encoder with a low-rank adapter each; an invariant
projection of x then joins each domain's own projection. Gated cross-attention (arXiv 2510.09435) can be put between
the two domain streams at three points:

    GCA0, early   right after the embeddings
    GCA1, mid     after the sequence encoder (attention, feed-forward, norm)
    GCA2, late    on the final states, before they are multiplied with the item vectors

What may attend to what is decided by the rows' clocks (`gcalib.data.batches`): a query sees a row of the other domain
if nothing in that row is newer than the query's slot. A row that no cross-attention has touched depends on `seen`;
one that was itself a query depends on all up to its own `slot`. So a first cross-attention (0 or 1) sees the other
domain's newest item, a later one (in a stack, or at 2) sees it through what the first made of it.

Ours and official: with `as_published` the model repeats the official code to rounding (positions counted within each
stream, attention not masked at pads). Without it, positions count in the mixed sequence and pads are invisible. Both
are trained against negatives shared by the batch, where the official code draws a set for each position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gcalib.attention import GatedCrossAttention, newest_visible
from gcalib.config import RunConfig
from gcalib.data.batches import Batch, Queries, Stream
from gcalib.layers import Dropout, LoRA, SelfAttention, SwiGLU
from gcalib.models.base import Recommender, info_nce, mean_per_user
from gcalib.packing import Layout, spread_rows, take_rows

LATE = 2


class ABXI(Recommender):
    """See the module's docstring; every width and rate comes from `RunConfig`."""

    def __init__(self, config: RunConfig, num_items: tuple[int, int]) -> None:
        super().__init__()
        d = config.dim
        self.num_items = num_items
        self.window = config.max_length - 3  # input slots left by leave-one-out and by the shift to targets
        self.as_published = config.as_published
        self.temperature = config.temperature
        self.gca_points = config.gca
        self.reads_tails = bool({0, 1} & set(config.gca))

        self.item = nn.Embedding(1 + sum(num_items), d, padding_idx=0)
        self.position = nn.Embedding(1 + self.window, d, padding_idx=0)
        self.dropout = Dropout(config.dropout)

        self.attention = SelfAttention(d, config.self_heads)
        self.attention_norm = nn.LayerNorm(d)
        self.ffn = SwiGLU(d, config.hidden)
        self.lora = nn.ModuleDict({s: LoRA(d, config.domain_rank) for s in "xab"})
        self.ffn_norm = nn.ModuleDict({s: nn.LayerNorm(d) for s in "xab"})

        self.invariant = SwiGLU(d, config.hidden)
        self.invariant_lora = nn.ModuleDict({s: LoRA(d, config.invariant_rank) for s in "ab"})
        self.invariant_norm = nn.ModuleDict({s: nn.LayerNorm(d) for s in "ab"})
        self.own = nn.ModuleDict({s: SwiGLU(d, config.hidden) for s in "ab"})
        self.own_norm = nn.ModuleDict({s: nn.LayerNorm(d) for s in "ab"})
        self.apply(_initialise)

        # made last, so that a seed gives the baseline the same start with and without them
        self.gca = nn.ModuleDict(
            {f"{point}{s}": GatedCrossAttention(d, config.heads, config.gate) for point in config.gca for s in "ab"}
        )
        for name, module in self.gca.items():
            module.name = f"{name[1]}.gca{name[0]}"  # type: ignore[assignment]

    def forward(self, batch: Batch) -> tuple[Float[Tensor, "queries_a dim"], Float[Tensor, "queries_b dim"]]:
        streams = (batch.mixed, *batch.own)
        # In evaluation only the newest states are asked for: older rows go no further than the last layer in which
        # another row reads them.
        newest_only = not self.training and LATE not in self.gca_points
        queries = [q.newest() for q in batch.queries] if newest_only else list(batch.queries)
        has_own = [q.own_row >= 0 for q in queries]
        read = [q.own_row[has] for q, has in zip(queries, has_own, strict=True)]

        # 1. embeddings
        h = self.dropout(torch.cat([self.item(s.items) + self.position(s.position) for s in streams]))
        if 0 in self.gca_points:
            x, a, b = h.split([len(s.items) for s in streams])
            h = torch.cat([x, *self._cross(0, a, b, *(_untouched(s) for s in batch.own))])

        # 2. shared causal self-attention, post-norm residual
        pads = [s.pads for s in streams] if self.as_published else None
        h = self.attention_norm(h + self.dropout(self.attention(h, [s.layout for s in streams], pads)))

        x, a, b = h.split([len(s.items) for s in streams])
        if newest_only:
            x = x[queries[0].mixed_row]
        if 1 not in self.gca_points:
            a, b = _only(a, read[0]), _only(b, read[1])

        # 3. shared feed-forward, with a low-rank adapter and a norm for each stream
        rows = torch.cat([x, a, b])
        fed = (rows + self.dropout(self.ffn(rows))).split([len(x), len(a), len(b)])
        x, a, b = (
            self.ffn_norm[s](f + self.dropout(self.lora[s](h))) for s, f, h in zip("xab", fed, (x, a, b), strict=True)
        )
        if 1 in self.gca_points:
            clocks = _touched if 0 in self.gca_points else _untouched
            a, b = self._cross(1, a, b, *(clocks(s) for s in batch.own))
            a, b = _only(a, read[0]), _only(b, read[1])

        # 4. the invariant projection of x joins each domain's own
        h_i = self.invariant(x)
        states = []
        for s, own, query, has in zip("ab", (a, b), queries, has_own, strict=True):
            x_s, i_s = (x, h_i) if newest_only else (take_rows(h, query.mixed_row) for h in (x, h_i))
            shared = self.invariant_norm[s](x_s + self.dropout(i_s) + self.dropout(self.invariant_lora[s](x_s)))
            private = self.own_norm[s](own + self.dropout(self.own[s](own)))
            # Before a domain's first item its row is zero, and what a norm makes of zero is its bias.
            missing = torch.where(has.unsqueeze(1), 0.0, cast(Tensor, self.own_norm[s].bias))
            states.append(shared + spread_rows(private, torch.nonzero(has).squeeze(1), len(has)) + missing)
        if LATE in self.gca_points:
            states = list(self._cross(LATE, *states, *(_final(q, batch.size) for q in queries)))
            if not self.training:
                states = [state[query.last] for state, query in zip(states, queries, strict=True)]
        return states[0], states[1]

    def _cross(
        self, point: int, a: Tensor, b: Tensor, clocks_a: Clocks, clocks_b: Clocks
    ) -> tuple[Float[Tensor, "rows_a dim"], Float[Tensor, "rows_b dim"]]:
        """Cross-attention in both directions, each from what went in."""
        out = []
        for s, x, y, of_x, of_y in (("a", a, b, clocks_a, clocks_b), ("b", b, a, clocks_b, clocks_a)):
            key_time = _padded(of_y.key_time, of_y.layout, fill=2**31)
            query_time = _padded(of_x.query_time, of_x.layout, fill=-1)
            mask = key_time.unsqueeze(1) < query_time.unsqueeze(2)
            partner = newest_visible(y, of_y.layout, mask, of_x.layout)
            gca = self.gca[f"{point}{s}"]
            assert isinstance(gca, GatedCrossAttention)
            out.append(gca.rows(x, y, partner, of_x.layout, of_y.layout, mask, sequence=of_x.sequence))
        return out[0], out[1]

    def item_vectors(self, domain: int) -> Float[Tensor, "items dim"]:
        nA, nB = self.num_items
        return self.item.weight[1 : 1 + nA] if domain == 0 else self.item.weight[1 + nA : 1 + nA + nB]

    def loss(self, batch: Batch, negatives: Int[Tensor, " negatives"]) -> tuple[Tensor, Tensor]:
        """InfoNCE of each domain: averaged over a user's targets in it, then over the batch's users."""
        vectors = self.item(negatives)
        place = torch.full((1 + sum(self.num_items),), -1, device=negatives.device)
        place[negatives] = torch.arange(len(negatives), device=negatives.device)
        losses = []
        for state, queries in zip(self(batch), batch.queries, strict=True):
            positive = (state * self.item(queries.targets)).sum(dim=1) / self.temperature
            # the softmax over a thousand negatives needs more digits than bf16 has
            negative = (state @ vectors.T).to(positive.dtype) / self.temperature
            # A target drawn as a negative is no negative of its own row.
            hit = torch.nonzero(place[queries.targets] >= 0).squeeze(1)
            negative = negative.index_put((hit, place[queries.targets[hit]]), negative.new_tensor(float("-inf")))
            losses.append(info_nce(positive, negative, mean_per_user(queries.sequence, batch.size)))
        return losses[0], losses[1]


def _initialise(module: nn.Module) -> None:
    """The start of the official code: N(0, 0.02) weights, zero biases; LoRA starts itself, with B at zero."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    elif isinstance(module, SelfAttention):
        # torch's own attention, which the official code uses, draws these wider than the rest
        nn.init.xavier_uniform_(module.query_key_value.weight)


@dataclass(frozen=True)
class Clocks:
    """What a cross-attention needs to know of one side's rows: a query sees keys with `key_time < query_time`."""

    sequence: Int[Tensor, " rows"]
    key_time: Int[Tensor, " rows"]
    query_time: Int[Tensor, " rows"]
    layout: Layout


def _untouched(stream: Stream) -> Clocks:
    """A row that was no query yet depends on its own event: seen at every slot from that one on."""
    return Clocks(stream.sequence, stream.seen, stream.slot + 1, stream.layout)


def _touched(stream: Stream) -> Clocks:
    """A row that was a query depends on all up to its slot.

    In training the slots of the two domains differ, each predicting one event; only in evaluation do both domains
    ask at the newest slot. The strict comparison keeps those two from seeing each other, as in training.
    """
    return Clocks(stream.sequence, stream.slot, stream.slot, stream.layout)


def _final(queries: Queries, batch_size: int) -> Clocks:
    """Final states depend on the mixed stream up to their slot."""
    return Clocks(queries.sequence, queries.slot, queries.slot, Layout.of(queries.sequence, batch_size))


def _padded(values: Int[Tensor, " rows"], layout: Layout, fill: int) -> Int[Tensor, "batch length"]:
    flat = values.new_full((layout.batch * layout.length,), fill)
    return flat.index_copy_(0, layout.index, values).view(layout.batch, layout.length)


def _only(rows: Tensor, read: Int[Tensor, " read"]) -> Tensor:
    """The rows that a query reads, in order; mostly all of them."""
    return rows if len(read) == len(rows) else take_rows(rows, read)
