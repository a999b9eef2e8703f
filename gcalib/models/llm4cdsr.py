"""LLM4CDSR: cross-domain sequential recommendation from the text of items (SIGIR 2025, arXiv 2504.18383).

With t_i the frozen vector of item i's text (`gcalib.data.text`), w wide, and e_i an embedding of its own, d wide:

    m_i = W2 (W1 t_i + b1) + b2                 adapter: two linear layers, trainable
    h_X = SASRec(sqrt(w) m_i + P_X)             over the mixed stream of both domains
    h_A = SASRec(sqrt(d) e_i + P_A)             over the events of A only, and likewise h_B
    score(i) = h_X . m_i + h_A . e_i            for i in A, likewise in B: state [h_X ; h_A], item vector [m_i ; e_i]

    L = BCE_A + BCE_B + alpha C(m_a, m_b) + beta C(g(p_u), h_X),  alpha = beta = 0.1

BCE is binary cross-entropy against one sampled negative per target, averaged over the domain's targets in the batch; C
is the contrast of `gcalib.models.losses.soft_contrast`; a and b are one item of A and one of B of the same user, p_u is
the vector of the user's profile, g an adapter like the first, and h_X the user's newest mixed state. e_i starts at the
principal components of the text vectors. `objective="infonce"` puts ABXI's loss in the place of BCE.

Gated cross-attention (arXiv 2510.09435) can be put between the two domain streams at three points:

    GCA0, early   right after the embeddings of A and of B
    GCA1, mid     after the sequence encoders
    GCA2, late    on the states h_A and h_B of the predictions, before they are joined with h_X

Ours and official: the official code masks neither the future nor pads, so in training every position sees the item it
is to predict. `published: [official_attention]` repeats that, and its binary cross-entropy leaves out, as the official
code does, targets before which the user has no item of their domain. Without it attention is causal, and such targets
count, with h_A = 0. The official code draws the negatives of h_X and of h_A apart, so that the two halves of a
negative's score are of two items; here they are of one, as in evaluation. A domain's e_i and its scores know nothing of
the other domain's items, so the negatives of InfoNCE are those of the target's domain. The profile p_u holds the target
of the state that it is contrasted with, in training only, since it is the text of all of the training history. The
official encoder also drops attention weights. The profiles in `params/` are smaller than what was published, and the
sentence encoder is 384 wide (a language model's 1,536).
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gcalib.attention import causal_mask
from gcalib.config import RunConfig
from gcalib.data.batches import Batch, Stream, items_of, rows_at
from gcalib.data.pair import Pair
from gcalib.data.text import TextVectors, text_vectors
from gcalib.layers import Dropout, TransformerEncoder
from gcalib.models.base import EARLY, LATE, MID, CrossDomainAttention, Recommender, States, start_small
from gcalib.models.losses import (
    binary_cross_entropy,
    draw_negatives,
    draw_new_to_users,
    info_nce,
    mean_per_user,
    shared_logits,
    soft_contrast,
)

LAYERS = 2
ALPHA = BETA = 0.1  # weights of the two contrasts, as published


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
        super().__init__(config, num_items)
        d, w = config.dim, vectors.items.shape[1]
        self.text_facts = vectors.facts()
        self.official = "official_attention" in config.published
        self.keep_last_item = bool({EARLY, MID} & set(config.gca))

        # Frozen, and known from the data: neither parameters nor part of a checkpoint.
        padding = np.zeros((1, w), dtype=np.float32)
        self.register_buffer("text_items", torch.from_numpy(np.concatenate([padding, vectors.items])), persistent=False)
        self.register_buffer("text_users", torch.from_numpy(vectors.users), persistent=False)
        inner = max(1, w // 2)
        self.adapter = nn.Sequential(nn.Linear(w, inner), nn.Linear(inner, d))
        self.user_adapter = nn.Sequential(nn.Linear(w, inner), nn.Linear(inner, d))
        self.item = nn.Embedding(1 + sum(num_items), d, padding_idx=0)
        self.position = nn.ModuleDict({s: nn.Embedding(1 + self.window, d, padding_idx=0) for s in "xab"})
        self.encoder = nn.ModuleDict(
            {s: TransformerEncoder(d, LAYERS, config.self_heads, config.dropout, config.hidden) for s in "xab"}
        )
        self.dropout = Dropout(config.dropout)
        self.apply(start_small)
        components = vectors.components[:, :d]
        self.item.weight.data[1:, : components.shape[1]] = torch.from_numpy(components)

        # made last, so that a seed gives the plain model the same initial weights with and without them
        self.gca = CrossDomainAttention(config)

    def forward(self, batch: Batch) -> States:
        x, a, b = self.streams(batch, self.adapted(batch.mixed.items))
        if not batch.training:
            x, a, b = (s.newest(h) for s, h in zip((batch.mixed, *batch.domains), (x, a, b), strict=True))
            return torch.cat([x, a], dim=2), torch.cat([x, b], dim=2)
        return self.joined(x, a, batch.a), self.joined(x, b, batch.b)

    def streams(self, batch: Batch, m: Float[Tensor, "B L dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """States h_X (B, L, d), h_A (B, l_A, d) and h_B (B, l_B, d); `m` are the mixed stream's adapted texts."""
        # 1. embeddings, scaled by the square root of the width they come from
        x = self.placed("x", m * self.text_items.size(1) ** 0.5, batch.mixed)
        a, b = (
            self.placed(s, e * self.config.dim**0.5, stream)
            for s, e, stream in zip("ab", self.embedded(*batch.domains), batch.domains, strict=True)
        )
        a, b = self.gca(EARLY, (a, b), batch)

        # 2. one sequence encoder per stream; before a domain's first item its state is zero
        x, a, b = (
            self.encode(s, h, stream)
            for s, h, stream in zip("xab", (x, a, b), (batch.mixed, *batch.domains), strict=True)
        )
        a, b = self.gca(MID, (a, b), batch)
        a, b = self.gca(LATE, (a, b), batch, of_predictions=True)
        return x, a, b

    def placed(self, s: str, h: Tensor, stream: Stream) -> Tensor:
        """With position embeddings, which count a stream's items from the oldest (1)."""
        column = torch.arange(h.size(1), device=h.device)
        place = (column + (s == "x")) * stream.mask  # a domain's stream has its first item in column 1
        placed: Tensor = self.dropout(h + self.position[s](place)) * stream.mask.unsqueeze(2)
        return placed

    def encode(self, s: str, h: Tensor, stream: Stream) -> Tensor:
        """The sequence encoder of a stream, zero at pads."""
        mask, pads = causal_mask(stream.mask), None
        if self.official:  # all rows see all real rows, and the pads that fill the sequence up to the window
            mask = stream.mask.unsqueeze(1) | torch.eye(h.size(1), dtype=torch.bool, device=h.device)
            pads = (self.window - stream.mask.sum(dim=1, keepdim=True)).expand_as(stream.items)
        encoded: Tensor = self.encoder[s](h, stream.mask, mask, pads)
        return encoded

    def joined(self, x: Tensor, own: Tensor, stream: Stream) -> Float[Tensor, "B l two_dim"]:
        """The states [h_X ; h_A] of a domain's predictions."""
        return torch.cat([rows_at(x, stream.query_position.clamp(min=0)), own], dim=2)

    def adapted(self, items: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """The vectors m of items; each of them goes through the adapter once, however often it is named."""
        distinct, place = items.unique(return_inverse=True)
        return F.embedding(place, self.adapter(self.text_items[distinct]))

    def item_vectors(self, domain: int) -> Float[Tensor, "items two_dim"]:
        rows = items_of(self.num_items, domain)
        return torch.cat([self.adapter(self.text_items[rows]), self.item.weight[rows]], dim=1)

    def negatives(self, batch: Batch, rng: np.random.Generator) -> Int[Tensor, " drawn"]:
        """Item ids: for each user one of A, then for each user one of B (0 where there is none), then negatives.

        The users' items are those of the contrast C(m_a, m_b), drawn from the batch's mixed stream. As published
        there is one negative for each target, first those of A, of the target's domain and new to the user;
        for InfoNCE they are shared by the batch.
        """
        items = batch.mixed.items.cpu().numpy()
        keys = rng.random(items.shape)
        drawn = []
        for in_domain in ((items > 0) & (items <= self.num_items[0]), items > self.num_items[0]):
            column = (keys * in_domain).argmax(axis=1)[:, None]  # any of them, equally likely
            drawn.append(torch.from_numpy(np.take_along_axis(items * in_domain, column, axis=1)[:, 0]))
        if self.config.objective == "infonce":
            return torch.cat([*drawn, draw_negatives(rng, self.num_items, self.config.negatives)])
        return torch.cat([*drawn, *draw_new_to_users(rng, self.num_items, batch)])

    def loss(self, batch: Batch, negatives: Tensor) -> dict[str, Tensor]:
        """The recommendation losses "a" and "b", alpha times the "regulariser", beta times the "profile" contrast."""
        B, nA = batch.size, self.num_items[0]
        of_a, of_b, sampled = negatives.split([B, B, len(negatives) - 2 * B])
        both = (of_a > 0) & (of_b > 0)
        targets = [stream.targets[stream.predicts] for stream in batch.domains]
        named = [batch.mixed.items.flatten(), *targets, sampled, of_a[both], of_b[both]]
        m, *m_targets, m_sampled, m_a, m_b = self.adapted(torch.cat(named)).split([len(items) for items in named])
        e_a, e_b, e_sampled = self.item(torch.cat([*targets, sampled])).split([len(ids) for ids in (*targets, sampled)])

        x, *own = self.streams(batch, m.view(*batch.mixed.items.shape, -1))
        losses = {}
        for domain, (stream, h) in enumerate(zip(batch.domains, own, strict=True)):
            state, user = self.joined(x, h, stream)[stream.predicts], stream.predicts.nonzero()[:, 0]
            target = torch.cat([m_targets[domain], (e_a, e_b)[domain]], dim=1)
            mine = (sampled > nA) == bool(domain)
            vectors = torch.cat([m_sampled[mine], e_sampled[mine]], dim=1)
            if self.infonce:
                positive, negative = shared_logits(
                    state, targets[domain], target, sampled[mine][None], vectors[None], self.excluded(batch, user)
                )
                weight, temperature = mean_per_user(user, B), self.config.temperature
                losses["ab"[domain]] = info_nce(positive / temperature, negative / temperature, weight)
            else:
                positive, negative = (state * target).sum(dim=1), (state * vectors).sum(dim=1, keepdim=True)
                counted = stream.mask[stream.predicts] | (not self.official)
                weight = counted.to(positive.dtype) / counted.sum().clamp(min=1)
                losses["ab"[domain]] = binary_cross_entropy(positive, negative, weight)
        if batch.users is None:
            raise ValueError("The contrast with the users' profiles needs to know who the batch's users are.")
        profile = self.user_adapter(self.text_users[batch.users])
        losses["regulariser"] = ALPHA * soft_contrast(m_a, m_b)
        losses["profile"] = BETA * soft_contrast(profile, batch.mixed.newest(x)[:, 0])
        return losses

    def facts(self) -> dict[str, Any]:
        """Where the text came from in each domain, how much of the domain it covers, and a hash of its vectors."""
        return self.text_facts
