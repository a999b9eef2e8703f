"""ABXI: invariant interest adaptation for cross-domain sequential recommendation (WWW 2025, arXiv 2501.15118).

Three streams, the mixed one x and one a domain, pass a shared encoder with a low-rank adapter each; an invariant
projection of x then joins each domain's own projection. The loss is InfoNCE, `s_i = state . E[i]`:

    -log(exp(s_t / T) / (exp(s_t / T) + sum over negatives n of exp(s_n / T)))

Gated cross-attention (arXiv 2510.09435) can be put between the two domain streams at three points:

    GCA0, early   right after the embeddings
    GCA1, mid     after the sequence encoder (attention, feed-forward, norm)
    GCA2, late    on the final states, before they are multiplied with the item vectors

Ours and official: `published: [official_attention]` repeats the official code to rounding (positions counted within
each stream, pads attended to). Without it, positions count in the mixed sequence and pads are invisible. Both are
trained against negatives shared by the batch, where the official code draws a set for each position and leaves out the
items of the user's training history (`exclude_history_negatives`), but for A's last item, which its pool of B's
negatives holds, too. Through part of its history that code counted pads among the targets of A (`pads_as_targets`);
its last version does not, and its published figures name no version.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from gcalib.attention import causal_mask
from gcalib.config import RunConfig
from gcalib.data.batches import Batch, Stream, rows_at
from gcalib.layers import Dropout, LoRA, SelfAttention, SwiGLU, padded, real_rows
from gcalib.models.base import EARLY, LATE, MID, CrossDomainAttention, Recommender, States


class ABXI(Recommender):
    """See the module's docstring; every width and rate comes from `RunConfig`."""

    points: ClassVar = {
        0: "early, right after the embeddings",
        1: "mid, after the sequence encoder",
        2: "late, on the final states",
    }

    negatives_of_both = True

    def __init__(self, config: RunConfig, num_items: tuple[int, int]) -> None:
        super().__init__(config, num_items)
        d = config.dim
        self.infonce = True
        self.keep_last_item = bool({EARLY, MID} & set(config.gca))
        self.official = self.recency_in_domain = "official_attention" in config.published

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

        # made last, so that a seed gives the plain model the same initial weights with and without them
        self.gca = CrossDomainAttention(config)

    def forward(self, batch: Batch) -> States:
        # 1. h = drop(E[item] + P[position])
        streams = (batch.mixed, *batch.domains)
        x, a, b = (
            self.dropout(h + self.position(s.recency)) for h, s in zip(self.embedded(*streams), streams, strict=True)
        )  # (B, L, d), (B, l_A, d), (B, l_B, d)
        a, b = self.gca(EARLY, (a, b), batch)

        # in evaluation only the newest states are asked for, and only a later cross-attention reads older ones
        last_point = max(self.gca.points, default=EARLY)
        newest = not batch.training and last_point == EARLY
        x = self.encode("x", x, batch.mixed, batch, newest)
        a, b = (
            self.encode(s, h, stream, batch, newest) for s, h, stream in zip("ab", (a, b), batch.domains, strict=True)
        )
        a, b = self.gca(MID, (a, b), batch)
        if not batch.training and last_point == MID:
            x, a, b = (s.newest(h) for s, h in zip((batch.mixed, *batch.domains), (x, a, b), strict=True))

        newest = not batch.training and last_point < LATE
        states = self.combine(x, a, b, batch, newest)
        states = self.gca(LATE, states, batch, of_predictions=True)
        if not batch.training and last_point == LATE:
            states = batch.a.newest(states[0]), batch.b.newest(states[1])
        return states

    def encode(self, s: str, h: Tensor, stream: Stream, batch: Batch, newest: bool) -> Tensor:
        """Steps 2 and 3: shared causal attention and feed-forward, with a LoRA and a norm of the stream's own.

            h = LN(h + drop(Attention(h)));  h_s = LN_s(h + drop(FFN(h)) + drop(LoRA_s(h)))

        `newest`: only of each user's newest row.
        """
        pads = self.pads(stream, batch) if self.official else None
        h = self.attention_norm(h + self.dropout(self.attention(h, causal_mask(stream.mask), pads)))
        h, mask = (stream.newest(h), stream.newest_mask) if newest else (h, stream.mask)
        fed = padded(self.ffn(real_rows(h, mask)), mask)
        return self.ffn_norm[s](h + self.dropout(fed) + self.dropout(self.lora[s](h))) * mask.unsqueeze(2)

    def combine(self, x: Tensor, a: Tensor, b: Tensor, batch: Batch, newest: bool) -> States:
        """Step 4: h_i = FFN_i(h_x), and the state of a prediction in s = a, b.

            LN_is(h_x + drop(h_i) + drop(LoRA_is(h_x))) + LN_s(h_s + drop(FFN_s(h_s)))

        Before a domain's first item h_s is zero, and what the norm makes of zero is its bias.
        """
        real = batch.mixed.newest_mask if newest else batch.mixed.mask
        h_i = padded(self.invariant(real_rows(x, real)), real)
        states = []
        for s, h, stream in zip("ab", (a, b), batch.domains, strict=True):
            # the mixed row at which each prediction is made
            x_s, i_s = (t if newest else rows_at(t, stream.query_position.clamp(min=0)) for t in (x, h_i))
            shared = self.invariant_norm[s](x_s + self.dropout(i_s) + self.dropout(self.invariant_lora[s](x_s)))
            real = stream.newest_mask if newest else stream.mask
            fed = padded(self.own[s](real_rows(h, real)), real)
            states.append(shared + self.own_norm[s](h + self.dropout(fed)))
        return states[0], states[1]

    def pads(self, stream: Stream, batch: Batch) -> Tensor:
        """How many pads official ABXI lets each row attend to: columns up to the row's own less real rows there."""
        columns = torch.arange(stream.items.size(1), device=stream.items.device)
        inputs = batch.mixed.mask.sum(dim=1, keepdim=True)
        if stream is batch.mixed:
            return (self.window - inputs).expand_as(stream.items)
        return (self.window - inputs + stream.query_position - (columns - 1)).clamp(min=0)

    @property
    def hidden(self) -> int:
        return self.ffn.inner.out_features

    def user_weights(self, batch: Batch, stream: Stream, user: Tensor) -> Tensor:
        """With `pads_as_targets`, every input of the window without a target of B counts as a target of A in the mean.

        A pad's own loss is a constant, which is left out.
        """
        if stream is batch.a and "pads_as_targets" in self.config.published:
            return 1.0 / ((self.window - batch.b.predicts.sum(dim=1))[user] * batch.size)
        return super().user_weights(batch, stream, user)


def _initialise(module: nn.Module) -> None:
    """The start of the official code: N(0, 0.02) weights, zero biases; LoRA initialises itself, with B at zero."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    elif isinstance(module, SelfAttention):
        # torch's own attention, which the official code uses, draws these wider than the rest
        nn.init.xavier_uniform_(module.query_key_value.weight)
