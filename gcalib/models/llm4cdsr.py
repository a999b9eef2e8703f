"""LLM4CDSR: cross-domain sequential recommendation from the text of items (SIGIR 2025, arXiv 2504.18383).

With t_i the frozen vector of item i's text (`gcalib.data.text`), w wide, and e_i an embedding of its own, d wide:

    m_i = W2 (W1 t_i + b1) + b2                 adapter: two linear layers, trainable
    h_X = SASRec(sqrt(w) m_i + P_X)             over the mixed stream of both domains
    h_A = SASRec(sqrt(d) e_i + P_A)             over the events of A only, and likewise h_B
    score(i) = h_X . m_i + h_A . e_i            for i in A, likewise in B: state [h_X ; h_A], item vector [m_i ; e_i]

    L = BCE_A + BCE_B + alpha C(m_a, m_b) + beta C(g(p_u), h_X)

    C(X, Y): S = X Y^T,  T = softmax((X X^T + Y Y^T) / 2)       rows: the users of the batch
             mean over rows of  (T . -log softmax(S) + T^T . -log softmax(S^T)) / 2

BCE is binary cross-entropy against one sampled negative a target, averaged over the domain's targets in the batch;
a and b are one item of A and one of B of the same user, p_u is the vector of the user's profile, g an adapter like the
first, and h_X the user's newest mixed state. The targets T of the contrast are soft: what is alike may stay alike.
e_i starts at the principal components of the text vectors. `objective="infonce"` puts ABXI's loss in the place of BCE.

Gated cross-attention (arXiv 2510.09435) can be put between the two domain streams at three points; what may attend to
what is told in `gcalib.models.crossing`:

    GCA0, early   right after the embeddings of A and of B
    GCA1, mid     after the sequence encoders
    GCA2, late    on the states h_A and h_B of the predictions, before they are joined with h_X

Ours and official: the official code masks neither the future nor pads, so in training every position sees the item it
is to predict. `as_published` repeats that, and its binary cross-entropy leaves out, as the official code does, targets
before which the user has no item of their domain. Without it attention is causal. Then, and in InfoNCE, such targets
count, with h_A = 0. The official code draws the negatives of h_X and of h_A apart, so that the two halves of a
negative's score are of two items; here they are of one, as in evaluation. A domain's e_i and its scores know nothing of
the other domain's items, so the negatives of InfoNCE are those of the target's domain. The profile p_u holds the target
of the state that it is contrasted with, in training only, since it is the text of all of the training history.

The official encoder, as copies of it show (`nn.MultiheadAttention` with the rate of the rest), also drops attention
weights in training; ours does with `attention_dropout`. The comparison with the official program has no dropout.

The profiles in `params/` are smaller than what was published: width 64 (128), two heads (1), 47 inputs (200), batches
of 256 (128), AdamW (Adam), and a sentence encoder 384 wide (a language model's 1,536).
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gcalib.config import RunConfig
from gcalib.data.batches import Batch, Queries, Stream
from gcalib.data.pair import Pair
from gcalib.data.text import TextVectors, text_vectors
from gcalib.layers import Dropout, TransformerEncoder
from gcalib.models.base import (
    Recommender,
    binary_cross_entropy,
    draw_negatives,
    draw_new_to_users,
    info_nce,
    mean_per_user,
    shared_logits,
    soft_contrast,
    start_small,
)
from gcalib.models.crossing import Crossings, of_queries, touched, untouched
from gcalib.packing import spread_rows, take_rows

LAYERS = 2
LATE = 2


class LLM4CDSR(Recommender):
    """See the module's docstring; every width and rate comes from `RunConfig`."""

    points: ClassVar = {
        0: "early, right after the embeddings of A and B",
        1: "mid, after the sequence encoders",
        2: "late, on the domain states of the predictions",
    }
    text_items: Float[Tensor, "items_and_padding text"]
    text_users: Float[Tensor, "users text"]

    @classmethod
    def build(cls, config: RunConfig, pair: Pair) -> Self:
        return cls(config, pair.num_items, text_vectors(pair, config.text))

    def __init__(self, config: RunConfig, num_items: tuple[int, int], vectors: TextVectors) -> None:
        super().__init__()
        d, w = config.dim, vectors.items.shape[1]
        self.num_items = num_items
        self.text_facts = vectors.facts()
        self.window = config.max_length - 3
        self.as_published = config.as_published
        self.num_negatives = config.negatives
        self.temperature = config.temperature
        self.objective, self.own_negatives = config.objective, config.own_negatives
        self.alpha, self.beta = config.alpha, config.beta
        self.gca_points = config.gca
        self.reads_tails = bool({0, 1} & set(config.gca))

        # Frozen, and known from the data: neither parameters nor part of a checkpoint.
        padding = np.zeros((1, w), dtype=np.float32)
        self.register_buffer("text_items", torch.from_numpy(np.concatenate([padding, vectors.items])), persistent=False)
        self.register_buffer("text_users", torch.from_numpy(vectors.users), persistent=False)
        inner = config.adapter or max(1, w // 2)
        self._widths = {"hidden": config.hidden or d, "layers": config.layers or LAYERS, "adapter": inner}
        self.adapter = nn.Sequential(nn.Linear(w, inner), nn.Linear(inner, d))
        self.user_adapter = nn.Sequential(nn.Linear(w, inner), nn.Linear(inner, d))
        self.item = nn.Embedding(1 + sum(num_items), d, padding_idx=0)
        self.position = nn.ModuleDict({s: nn.Embedding(1 + self.window, d, padding_idx=0) for s in "xab"})
        shape = (d, config.layers or LAYERS, config.self_heads, config.dropout, config.hidden)
        self.encoder = nn.ModuleDict({s: TransformerEncoder(*shape, config.attention_dropout) for s in "xab"})
        self.dropout = Dropout(config.dropout)
        self.apply(start_small)
        if config.local_init == "text":
            components = vectors.components[:, :d]
            self.item.weight.data[1:, : components.shape[1]] = torch.from_numpy(components)
        self.item.weight.requires_grad_(not config.local_frozen)

        # made last, so that a seed gives the baseline the same start with and without them
        self.gca = Crossings(config, d)

    def forward(self, batch: Batch) -> tuple[Float[Tensor, "queries_a two_dim"], Float[Tensor, "queries_b two_dim"]]:
        mixed, *own = self._states(batch, self._adapted(batch.mixed.items))
        queries = batch.queries if self.training else [query.newest() for query in batch.queries]
        a, b = (self._joined(mixed, h, query) for h, query in zip(own, queries, strict=True))
        return a, b

    def _states(
        self, batch: Batch, embedded: Float[Tensor, "mixed_rows dim"]
    ) -> tuple[Float[Tensor, "mixed_rows dim"], Float[Tensor, "queries_a dim"], Float[Tensor, "queries_b dim"]]:
        """States h_X of the rows, and h_A and h_B of the predictions (in evaluation: of each user's newest one).

        `embedded` is m of the mixed stream's rows.
        """
        # 1. embeddings, scaled by the square root of the width they come from
        x = self._placed("x", embedded * self.text_items.shape[1] ** 0.5, batch.mixed)
        a, b = (
            self._placed(s, self.item(stream.items) * self.item.embedding_dim**0.5, stream)
            for s, stream in zip("ab", batch.own, strict=True)
        )
        if 0 in self.gca_points:
            a, b = self.gca.cross(0, a, b, *(untouched(stream) for stream in batch.own))

        # 2. one sequence encoder a stream
        length = self.window if self.as_published else None
        x, a, b = (
            self.encoder[s](h, stream.layout, published_length=length)
            for s, h, stream in zip("xab", (x, a, b), (batch.mixed, *batch.own), strict=True)
        )
        if 1 in self.gca_points:
            clocks = touched if 0 in self.gca_points else untouched
            a, b = self.gca.cross(1, a, b, *(clocks(stream) for stream in batch.own))

        # 3. the row behind each prediction; before a domain's first item nothing is known of it. Older predictions
        # matter in evaluation only where a late cross-attention reads them.
        all_of_them = self.training or LATE in self.gca_points
        queries = batch.queries if all_of_them else [query.newest() for query in batch.queries]
        a, b = (_at(h, query.own_row) for h, query in zip((a, b), queries, strict=True))
        if LATE in self.gca_points:
            a, b = self.gca.cross(LATE, a, b, *(of_queries(query, batch.size) for query in queries))
            if not self.training:
                a, b = (h[query.last] for h, query in zip((a, b), queries, strict=True))
        return x, a, b

    def _placed(self, s: str, h: Float[Tensor, "rows dim"], stream: Stream) -> Float[Tensor, "rows dim"]:
        """With position embeddings, which count a stream's rows from the oldest (1)."""
        place = 1 + stream.layout.index % stream.layout.length
        placed: Tensor = self.dropout(h + self.position[s](place))
        return placed

    def _joined(
        self, mixed: Float[Tensor, "mixed_rows dim"], own: Float[Tensor, "queries dim"], queries: Queries
    ) -> Float[Tensor, "queries two_dim"]:
        """The state [h_X ; h_A]."""
        return torch.cat([take_rows(mixed, queries.mixed_row), own], dim=1)

    def _adapted(self, items: Int[Tensor, " rows"]) -> Float[Tensor, "rows dim"]:
        """The vectors m of items; each of them goes through the adapter once, however often it is named."""
        distinct, place = items.unique(return_inverse=True)
        return F.embedding(place, self.adapter(self.text_items[distinct]))

    def item_vectors(self, domain: int) -> Float[Tensor, "items two_dim"]:
        nA, nB = self.num_items
        rows = slice(1, 1 + nA) if domain == 0 else slice(1 + nA, 1 + nA + nB)
        return torch.cat([self.adapter(self.text_items[rows]), self.item.weight[rows]], dim=1)

    def negatives(self, batch: Batch, rng: np.random.Generator) -> Int[Tensor, " drawn"]:
        """Item ids: for each user one of A, then for each user one of B (0 where there is none), then negatives.

        The users' items are those of the contrast C(m_a, m_b), drawn from the batch's mixed stream. As published
        there is one negative for each target, first those of A, of the target's domain and new to the user;
        for InfoNCE they are shared by the batch.
        """
        items, sequence = batch.mixed.items.cpu().numpy(), batch.mixed.sequence.cpu().numpy()
        nA, nB = self.num_items
        drawn = []
        shuffled = rng.permutation(len(items))
        for domain in (0, 1):
            mine = shuffled[(items[shuffled] > nA) == bool(domain)]
            picked = np.zeros(batch.size, dtype=np.int64)
            picked[sequence[mine]] = items[mine]  # of a user's items the last one written stays: any, equally likely
            drawn.append(torch.from_numpy(picked))
        if self.objective == "infonce":
            return torch.cat([*drawn, draw_negatives(rng, self.num_items, self.num_negatives)])
        return torch.cat([*drawn, *draw_new_to_users(rng, self.num_items, batch)])

    def loss(self, batch: Batch, negatives: Tensor) -> dict[str, Tensor]:
        """The recommendation losses "a" and "b", alpha times the "regulariser", beta times the "profile" contrast."""
        of_a, of_b, sampled = negatives.split([batch.size, batch.size, len(negatives) - 2 * batch.size])
        both = torch.nonzero((of_a > 0) & (of_b > 0)).squeeze(1)
        named = [batch.mixed.items, *(query.targets for query in batch.queries), sampled, of_a[both], of_b[both]]
        rows, target_a, target_b, m_sampled, m_a, m_b = self._adapted(torch.cat(named)).split([len(n) for n in named])
        candidates = torch.cat([m_sampled, self.item(sampled)], dim=1)
        in_b = sampled > self.num_items[0]

        mixed, *own = self._states(batch, rows)
        losses = {}
        parts = zip(batch.queries, own, (target_a, target_b), self.spared(batch), strict=True)
        for domain, (query, h, m, spared) in enumerate(parts):
            state = self._joined(mixed, h, query)
            target = torch.cat([m, self.item(query.targets)], dim=1)
            mine = torch.nonzero(in_b == bool(domain)).squeeze(1)
            of_mine = take_rows(candidates, mine)
            if self.objective == "infonce":
                positive, negative = shared_logits(state, query.targets, target, sampled[mine], of_mine, spared)
                weight = mean_per_user(query.sequence, batch.size)
                losses["ab"[domain]] = info_nce(positive / self.temperature, negative / self.temperature, weight)
            else:
                positive, negative = (state * target).sum(dim=1), (state * of_mine).sum(dim=1, keepdim=True)
                counted = (query.own_row >= 0) | (not self.as_published)
                weight = counted.to(positive.dtype) / counted.sum().clamp(min=1)
                losses["ab"[domain]] = binary_cross_entropy(positive, negative, weight)
        if self.alpha:
            losses["regulariser"] = self.alpha * soft_contrast(m_a, m_b)
        if self.beta:
            if batch.users is None:
                raise ValueError(
                    "The contrast with the users' profiles (beta) needs to know who the batch's users are."
                )
            profile = self.user_adapter(self.text_users[batch.users])
            newest = batch.mixed.layout.real().sum(dim=1).cumsum(dim=0) - 1
            losses["profile"] = self.beta * soft_contrast(profile, take_rows(mixed, newest))
        return losses

    @property
    def widths(self) -> dict[str, int]:
        return self._widths

    def facts(self) -> dict[str, Any]:
        """Where the text came from in each domain, how much of the domain it covers, and a hash of its vectors."""
        return self.text_facts


def _at(rows: Float[Tensor, "rows dim"], index: Int[Tensor, " queries"]) -> Float[Tensor, "queries dim"]:
    """`rows[index]`, zero where the index is -1; no row is asked for twice."""
    has = index >= 0
    return spread_rows(take_rows(rows, index[has]), torch.nonzero(has).squeeze(1), len(index))
