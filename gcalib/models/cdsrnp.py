"""CDSRNP: a neural process for cross-domain sequential recommendation (Li et al., arXiv 2410.13588).

No official code was found; this is built from the paper's description, and what it leaves open is decided here:

    h_0   = sqrt(d) E[item] + P_s[position]                  one item table; positions, encoder, decoder a domain s
    h_s   = TransformerEncoder_s(h_0)                        causal, two layers, as SASRec
    r_u   = MLP([A representation ; B representation ; E[target]])          one triple a user
    q     = N(mean(r), exp(logvar(r))),  r = mean of r_u     prior: support users; posterior: support and query users
    z     ~ posterior in training, mean of the prior in evaluation
    state = LayerNorm(h + CA(film(h), h_1 .. h)),  film(h) = h (1 + gamma(z)) + beta(z)     causal, the domain's rows
    loss  = L_A + L_B + kl_weight KL(posterior || prior)     L: binary cross-entropy, or InfoNCE with `objective`

- **Support set.** `support` users, drawn once from those whose training history has both domains; users of one domain
  can be query users (all users of a batch are), never support. A support user in the batch counts in the posterior
  twice. A training step encodes a random `STEP_SUPPORT` of them, evaluation all: the mean of a part is an unbiased
  guess of the mean of all, at a fraction of the cost.
- **Triples.** The representations are a user's newest rows in A and B (zero in a domain without any) after the
  sequence encoder, the target is the event that follows. One z serves all query users of a batch. Gradients end at the
  triples: embeddings and sequence encoders learn from what they predict, the latent from what they hold. Let through,
  the KL's gradient would reward representations that shrink.
- **Decoder.** z changes what the last state looks for in the user's own sequence of the domain, not each candidate,
  so the score stays `state . item vector` and ranking all items one matrix product. Before a domain's first item the
  state is the norm's bias, which learns what is popular. The other domain of a user thus reaches a state through
  cross-attention only; without it the model knows of the other domain what z tells of all users.
- **KL** is summed over the latent's dimensions, once a batch, beside losses averaged over users. `latent=0` leaves z
  out: the decoder attends unmodulated and there is no support.

Gated cross-attention (arXiv 2510.09435) between the domains' rows: GCA0 after the embeddings, GCA1 after the sequence
encoders, GCA2 on the decoder's states. A domain without a row has none at any point.

**The future.** Given z no state depends on later events, in training and evaluation, and in evaluation z depends on
the support's training histories only. In training, however, the posterior has read the query users' own triples, as in
every neural process: z knows of each, within a mean over the batch, its newest rows and its last training event, which
is the target of the newest state and the future of the earlier ones. One target a user is the least with which the
posterior is a posterior; on a per-domain pair, where no event is the last, it is one a domain.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gcalib.attention import untapped
from gcalib.config import RunConfig
from gcalib.data.batches import Batch, Stream, make_batch
from gcalib.data.pair import Pair
from gcalib.layers import Dropout, TransformerEncoder
from gcalib.models.base import Recommender, next_item_losses, start_small
from gcalib.models.crossing import Crossings, touched, untouched
from gcalib.models.neural_process import Gaussian, InterestDecoder, LatentEncoder, Support
from gcalib.packing import spread_rows, take_rows

LAYERS = 2
STEP_SUPPORT = 32  # support users that a training step encodes

Rows = tuple[Float[Tensor, "rows_a dim"], Float[Tensor, "rows_b dim"]]


class CDSRNP(Recommender):
    """See the module's docstring; every width and rate comes from `RunConfig`.

    Parameters
    ----------
    support
        Needed unless `config.latent` is 0.
    """

    points: ClassVar = {
        0: "early, right after the embeddings",
        1: "mid, after the sequence encoders",
        2: "late, on the decoder's states",
    }
    needs_clock: ClassVar = False

    @classmethod
    def build(cls, config: RunConfig, pair: Pair) -> Self:
        """A fresh model with its support set.

        Raises
        ------
        ValueError
            For a stack on a per-domain pair, or if no user can be support.
        """
        if not pair.has_clock and len(config.gca) > 1:
            raise ValueError(
                f"gca={config.gca} cannot be stacked on {pair.name}, a per-domain pair: without a common clock, rows "
                "that one cross-attention has touched hold the future of the other domain, which the next would read "
                "back; give a single insertion point."
            )
        support = None if config.latent == 0 else Support.draw(pair, config.support, config.seed)
        return cls(config, pair.num_items, support)

    def __init__(self, config: RunConfig, num_items: tuple[int, int], support: Support | None = None) -> None:
        super().__init__()
        d = config.dim
        latent = d if config.latent is None else config.latent
        self.num_items = num_items
        self.window = config.max_length - 3
        self.num_negatives = config.negatives
        self.negative_groups = config.negative_groups
        self.own_negatives = config.own_negatives
        self.temperature = config.temperature
        self.objective = config.objective
        self.kl_weight = config.kl_weight
        self._widths = {"hidden": config.hidden or d, "layers": config.layers or LAYERS}
        self.gca_points = config.gca
        # a user's newest row of each domain, whether or not it predicts: for cross-attention and for the triples
        self.reads_tails = bool(config.gca) or latent > 0
        self.support = support
        self._z: Tensor | None = None  # the prior's mean, while in evaluation mode

        self.item = nn.Embedding(1 + sum(num_items), d, padding_idx=0)
        self.position = nn.ModuleList(nn.Embedding(1 + self.window, d, padding_idx=0) for _ in "ab")
        self.dropout = Dropout(config.dropout)
        self.encoder = nn.ModuleList(
            TransformerEncoder(
                d, config.layers or LAYERS, config.self_heads, config.dropout, config.hidden, config.attention_dropout
            )
            for _ in "ab"
        )
        self.decoder = nn.ModuleList(InterestDecoder(d, config.self_heads, latent, config.dropout) for _ in "ab")
        self.latent = LatentEncoder(d, latent) if latent else None
        self.apply(start_small)
        for module in self.modules():
            if isinstance(module, InterestDecoder) and module.film is not None:
                nn.init.zeros_(module.film.weight)  # z says nothing at first, when it is mostly noise
        # made last, so that a seed gives the baseline the same start with and without them
        self.gca = Crossings(config, d)

    def forward(self, batch: Batch, z: Float[Tensor, " latent"] | None = None) -> Rows:
        """States that predict; `z` instead of the sample or the prior's mean, if given."""
        rows = self.encode(batch)
        if z is None and self.latent is not None:
            z = self.distributions(batch, rows)[1].sample() if self.training else self.prior_mean()
        return self.answer(batch, self.decode(batch, rows, z))

    def encode(self, batch: Batch) -> Rows:
        """Rows of the two domains after the sequence encoders."""
        sizes = [len(s.items) for s in batch.own]
        # one lookup for both domains: each costs a gradient as large as the table
        items = self.item(torch.cat([s.items for s in batch.own])) * self.item.embedding_dim**0.5
        a, b = (
            self.dropout(item + position(s.position))
            for item, s, position in zip(items.split(sizes), batch.own, self.position, strict=True)
        )
        if 0 in self.gca_points:
            a, b = self.gca.cross(0, a, b, *(untouched(s) for s in batch.own))
        a, b = (encoder(h, s.layout) for encoder, h, s in zip(self.encoder, (a, b), batch.own, strict=True))
        if 1 in self.gca_points:
            a, b = self._cross(1, a, b, batch)
        return a, b

    def distributions(self, batch: Batch, rows: Rows) -> tuple[Gaussian, Gaussian]:
        """Prior, given a random part of the support, and posterior, given that and the batch's users."""
        assert self.latent is not None and self.support is not None
        known = self._support_triples(torch.randperm(len(self.support.users))[:STEP_SUPPORT].tolist())
        return self.latent(known), self.latent(known, self._triples(batch, rows))

    @torch.no_grad()
    def prior_mean(self) -> Float[Tensor, " latent"]:
        """The z of evaluation, given all of the support; kept until mode, type, device or loaded weights change."""
        if self._z is None:
            assert self.latent is not None and self.support is not None
            self._z = self.latent(self._support_triples(list(range(len(self.support.users))))).mean
        return self._z

    def train(self, mode: bool = True) -> Self:
        """Change mode; what evaluation keeps is forgotten, whichever the new mode."""
        self._z = None
        return super().train(mode)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As in torch; what evaluation keeps is forgotten."""
        self._z = None
        return super().load_state_dict(*args, **options)

    def _apply(self, *args: Any, **options: Any) -> Self:
        """What `.to`, `.double` and the like go through; what evaluation keeps is forgotten."""
        self._z = None
        return super()._apply(*args, **options)

    def decode(self, batch: Batch, rows: Rows, z: Float[Tensor, " latent"] | None) -> Rows:
        """The state of every row of the two domains, given z."""
        a, b = (decode(h, s.layout, z) for decode, h, s in zip(self.decoder, rows, batch.own, strict=True))
        return self._cross(2, a, b, batch) if 2 in self.gca_points else (a, b)

    def answer(self, batch: Batch, states: Rows) -> Rows:
        """The states that the batch asks for: in training behind every target, in evaluation the newest."""
        answers = []
        for h, decoder, queries in zip(states, self.decoder, batch.queries, strict=True):
            asked = queries if self.training else queries.newest()
            has = asked.own_row >= 0
            missing = torch.where(has.unsqueeze(1), 0.0, cast(InterestDecoder, decoder).norm.bias)
            answers.append(spread_rows(take_rows(h, asked.own_row[has]), has.nonzero().squeeze(1), len(has)) + missing)
        return answers[0], answers[1]

    def loss(self, batch: Batch, negatives: Tensor) -> dict[str, Tensor]:
        """Loss of each domain (averaged over a user's targets, then over users), and `"kl"` unless latent is 0."""
        rows = self.encode(batch)
        z, losses = None, {}
        if self.latent is not None:
            prior, posterior = self.distributions(batch, rows)
            z, losses["kl"] = posterior.sample(), self.kl_weight * posterior.kl(prior)
        return losses | next_item_losses(
            self.answer(batch, self.decode(batch, rows, z)), batch, negatives, self.item,
            num_items_a=self.num_items[0], objective=self.objective, temperature=self.temperature,
            spared=self.spared(batch),
        )  # fmt: skip

    @property
    def widths(self) -> dict[str, int]:
        return self._widths

    def facts(self) -> dict[str, Any]:
        """Size of the support set and a hash of its users."""
        if self.support is None:
            return {}
        return {"support_users": len(self.support.users), "support_sha256": self.support.sha256}

    def _cross(self, point: int, a: Tensor, b: Tensor, batch: Batch) -> Rows:
        clocks = untouched if point == min(self.gca_points) else touched
        return self.gca.cross(point, a, b, *(clocks(s) for s in batch.own))

    @torch.no_grad()
    def _support_triples(self, places: list[int]) -> Float[Tensor, "triples three_dim"]:
        assert self.support is not None
        batch = make_batch(
            [self.support.histories[place] for place in places], self.num_items[0], window=self.window, training=True,
            tails=True, clock=self.support.has_clock,
        ).to(self.item.weight.device)  # fmt: skip
        with untapped(self):
            return self._triples(batch, self.encode(batch))

    @torch.no_grad()
    def _triples(self, batch: Batch, rows: Rows) -> Float[Tensor, "triples three_dim"]:
        """`[A representation ; B representation ; E[target]]` behind each newest target of a training batch."""
        a, b = (_newest(h, stream, batch.size) for h, stream in zip(rows, batch.own, strict=True))
        users = torch.cat([queries.sequence[queries.last] for queries in batch.queries])
        targets = torch.cat([queries.targets[queries.last] for queries in batch.queries])
        return torch.cat([a[users], b[users], self.item(targets)], dim=1)


def _newest(rows: Float[Tensor, "rows dim"], stream: Stream, size: int) -> Float[Tensor, "size dim"]:
    """Each user's last row, zero where there is none."""
    counts = torch.bincount(stream.sequence, minlength=size)
    has = counts.nonzero().squeeze(1)
    return spread_rows(take_rows(rows, counts.cumsum(0)[has] - 1), has, size)
