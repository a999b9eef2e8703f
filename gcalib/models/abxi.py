"""ABXI: invariant interest adaptation for cross-domain sequential recommendation (WWW 2025, arXiv 2501.15118).

Three streams, the mixed one x and one a domain, pass a shared encoder with a low-rank adapter each; an invariant
projection of x then joins each domain's own projection. Gated cross-attention (arXiv 2510.09435) can be put between
the two domain streams at three points:

    GCA0, early   right after the embeddings
    GCA1, mid     after the sequence encoder (attention, feed-forward, norm)
    GCA2, late    on the final states, before they are multiplied with the item vectors

What may attend to what is told in `gcalib.models.crossing`.

Ours and official: with `as_published` the model repeats the official code to rounding (positions counted within each
stream, attention not masked at pads). Without it, positions count in the mixed sequence and pads are invisible. Both
are trained against negatives shared by the batch, where the official code draws a set for each position and leaves out
the items of the user's training history (here `own_negatives=False` does), but for A's last item, which its pool of B's
negatives holds, too. Through part of its history that code counted pads, whose id is 0, among the targets of A (here
`pads_as_targets=True` does); its last version does not, and its published figures name no version.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gcalib.config import RunConfig
from gcalib.data.batches import Batch
from gcalib.layers import Dropout, LoRA, SelfAttention, SwiGLU
from gcalib.models.base import Recommender, info_nce, mean_per_user, shared_logits
from gcalib.models.crossing import Crossings, of_queries, touched, untouched
from gcalib.packing import spread_rows, take_rows

LATE = 2


class ABXI(Recommender):
    """See the module's docstring; every width and rate comes from `RunConfig`."""

    points: ClassVar = {
        0: "early, right after the embeddings",
        1: "mid, after the sequence encoder",
        2: "late, on the final states",
    }

    def __init__(self, config: RunConfig, num_items: tuple[int, int]) -> None:
        super().__init__()
        d = config.dim
        self.num_items = num_items
        self.window = config.max_length - 3  # input slots left by leave-one-out and by the shift to targets
        self.as_published = config.as_published
        self.pads_as_targets = config.pads_as_targets
        self.num_negatives = config.negatives
        self.negative_groups = config.negative_groups
        self.own_negatives = config.own_negatives
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
        self.gca = Crossings(config, d)

    def forward(self, batch: Batch) -> tuple[Float[Tensor, "queries_a dim"], Float[Tensor, "queries_b dim"]]:
        streams = (batch.mixed, *batch.own)
        # In evaluation only the newest states are asked for: older rows go no further than the last layer in which
        # another row reads them.
        newest_only = not self.training and LATE not in self.gca_points
        queries = [q.newest() for q in batch.queries] if newest_only else list(batch.queries)
        has_own = [q.own_row >= 0 for q in queries]
        read = [q.own_row[has] for q, has in zip(queries, has_own, strict=True)]

        # 1. h = drop(E[item] + P[position])
        h = self.dropout(torch.cat([self.item(s.items) + self.position(s.position) for s in streams]))
        if 0 in self.gca_points:
            x, a, b = h.split([len(s.items) for s in streams])
            h = torch.cat([x, *self.gca.cross(0, a, b, *(untouched(s) for s in batch.own))])

        # 2. h = LN(h + drop(Attention(h))), causal, one for all streams
        pads = [s.pads for s in streams] if self.as_published else None
        h = self.attention_norm(h + self.dropout(self.attention(h, [s.layout for s in streams], pads)))

        x, a, b = h.split([len(s.items) for s in streams])
        if newest_only:
            x = x[queries[0].mixed_row]
        if 1 not in self.gca_points:
            a, b = _only(a, read[0]), _only(b, read[1])

        # 3. h_s = LN_s(h + drop(FFN(h)) + drop(LoRA_s(h))), s = x, a, b
        rows = torch.cat([x, a, b])
        fed = (rows + self.dropout(self.ffn(rows))).split([len(x), len(a), len(b)])
        x, a, b = (
            self.ffn_norm[s](f + self.dropout(self.lora[s](h))) for s, f, h in zip("xab", fed, (x, a, b), strict=True)
        )
        if 1 in self.gca_points:
            clocks = touched if 0 in self.gca_points else untouched
            a, b = self.gca.cross(1, a, b, *(clocks(s) for s in batch.own))
            a, b = _only(a, read[0]), _only(b, read[1])

        # 4. h_i = FFN_i(h_x), the invariant projection, joins each domain's own: the state of a target in s = a, b is
        #    LN_is(h_x + drop(h_i) + drop(LoRA_is(h_x))) + LN_s(h_s + drop(FFN_s(h_s)))
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
            states = list(self.gca.cross(LATE, *states, *(of_queries(q, batch.size) for q in queries)))
            if not self.training:
                states = [state[query.last] for state, query in zip(states, queries, strict=True)]
        return states[0], states[1]

    @property
    def widths(self) -> dict[str, int]:
        return {"hidden": self.ffn.inner.out_features}

    def loss(self, batch: Batch, negatives: Tensor) -> dict[str, Tensor]:
        """InfoNCE of each domain: averaged over a user's targets in it, then over the batch's users.

            -log(exp(s_t / T) / (exp(s_t / T) + sum over negatives n of exp(s_n / T))),  s_i = state . E[i]

        With `pads_as_targets`, every slot of the window that holds no target of B counts as one of A in that average.
        A pad's own loss is a constant, which is left out.
        """
        vectors = self.item(negatives)
        losses = {}
        for domain, state, queries, spared in zip("ab", self(batch), batch.queries, self.spared(batch), strict=True):
            positive, negative = shared_logits(
                state, queries.targets, self.item(queries.targets), negatives, vectors, spared
            )
            if domain == "a" and self.pads_as_targets:
                of_b = torch.bincount(batch.queries[1].sequence, minlength=batch.size)
                weight = 1.0 / ((self.window - of_b)[queries.sequence] * batch.size)
            else:
                weight = mean_per_user(queries.sequence, batch.size)
            losses[domain] = info_nce(positive / self.temperature, negative / self.temperature, weight)
        return losses


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


def _only(rows: Tensor, read: Int[Tensor, " read"]) -> Tensor:
    """The rows that a query reads, in order; mostly all of them."""
    return rows if len(read) == len(rows) else take_rows(rows, read)
