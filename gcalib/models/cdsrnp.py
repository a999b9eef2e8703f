"""CDSRNP: a neural process for cross-domain sequential recommendation (Li et al., arXiv 2410.13588).

No official code was found; this is built from the paper's description, and what it leaves open is decided here:

    h_0   = sqrt(d) E[item] + P_s[recency]                   one item table; positions, encoder, decoder per domain s
    h_s   = TransformerEncoder_s(h_0)                        causal, two layers, as SASRec
    r_u   = MLP([A representation ; B representation ; E[target]])          one triple per user
    q     = N(mean(r), exp(logvar(r))),  r = mean of r_u     prior: support users; posterior: support and query users
    z     ~ posterior in training, mean of the prior in evaluation
    state = LayerNorm(h + CA(film(h), h_1 .. h)),  film(h) = h (1 + gamma(z)) + beta(z)     causal, the domain's rows
    loss  = L_A + L_B + KL(posterior || prior)               L: binary cross-entropy, or InfoNCE with `objective`

- **Neural process** (Garnelo et al. 2018, arXiv 1807.01622). A mean over observations, which no order changes, gives
  the distribution of z; training holds the one given all observations against the one given a part of them.
- **Support set.** `SUPPORT` users, drawn once from those whose training history has both domains; users of one domain
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
is the target of the newest state and the future of the earlier ones. One target per user is the least with which the
posterior is a posterior; on a per-domain pair, where no event is the last, it is one per domain.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gcalib.attention import causal_mask, recording_paused
from gcalib.config import RunConfig
from gcalib.data.batches import Batch, collate
from gcalib.data.pair import Pair
from gcalib.layers import Dropout, TransformerEncoder, attend_rows, padded, real_rows
from gcalib.models.base import EARLY, LATE, MID, CrossDomainAttention, Recommender, States, start_small

LAYERS = 2
SUPPORT = 256  # users of the support set
STEP_SUPPORT = 32  # of them, that a training step encodes


@dataclass(frozen=True, eq=False)
class Support:
    """Users of the support set, by number, and their training histories."""

    users: np.ndarray
    histories: list[np.ndarray]
    has_global_order: bool

    @classmethod
    def draw(cls, pair: Pair, seed: int) -> Support:
        """`SUPPORT` users (all, if there are fewer) whose training history gives a triple with both domains.

        Raises
        ------
        ValueError
            If no user has both domains in training.
        """
        training = pair.split("val")
        histories = [training.history(user) for user in range(pair.num_users)]
        able = np.flatnonzero([_has_triple(pair, history) for history in histories])
        if not len(able):
            raise ValueError(
                f"{pair.name} has no user with both domains in training, so there is no support set: cdsrnp needs one, "
                "or latent=0."
            )
        drawn = np.sort(np.random.default_rng([seed, 2]).choice(able, min(SUPPORT, len(able)), replace=False))
        return cls(drawn, [histories[user] for user in drawn], pair.has_global_order)


def _has_triple(pair: Pair, history: np.ndarray) -> bool:
    """Whether both domains have a row, and a target follows: the last event is one, or the last of each domain."""
    counts = np.bincount(pair.domain_of(history[:-1] if pair.has_global_order else history), minlength=2)
    return bool(counts.min() > 0 and (pair.has_global_order or counts.max() > 1))


@dataclass(frozen=True)
class Gaussian:
    """A diagonal normal distribution of the latent."""

    mean: Float[Tensor, " latent"]
    log_variance: Float[Tensor, " latent"]

    def sample(self) -> Float[Tensor, " latent"]:
        """`mean + sd * noise` (Kingma & Welling 2014), differentiable."""
        return self.mean + (0.5 * self.log_variance).exp() * torch.randn_like(self.mean)

    def kl(self, other: Gaussian) -> Float[Tensor, ""]:
        """KL(self || other), summed over dimensions: `(log v' - log v + (v + (m - m')^2) / v' - 1) / 2`."""
        ratio = self.log_variance - other.log_variance
        gap = (self.mean - other.mean) ** 2 / other.log_variance.exp()
        # expm1 keeps the digits of two nearly equal distributions, which is what they become
        return 0.5 * (torch.expm1(ratio) - ratio + gap).sum()


class LatentEncoder(nn.Module):
    """Triples to a Gaussian: an MLP for each, their mean, which no order of users changes, and two linear heads."""

    def __init__(self, dim: int, latent: int) -> None:
        super().__init__()
        self.triple = nn.Sequential(nn.Linear(3 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.mean = nn.Linear(dim, latent)
        self.log_variance = nn.Linear(dim, latent)

    def forward(self, *triples: Float[Tensor, "triples three_dim"]) -> Gaussian:
        embedded = self.triple(torch.cat(triples))
        with torch.autocast(embedded.device.type, enabled=False):  # a KL of nearly equal means needs more than bf16
            r = embedded.to(self.mean.weight.dtype).mean(dim=0)
            return Gaussian(self.mean(r), self.log_variance(r))


class InterestDecoder(nn.Module):
    """`LayerNorm(h + CA(film(h), h_1 .. h))`: each row attends to itself and the rows before it, as z directs."""

    def __init__(self, dim: int, heads: int, latent: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.film = nn.Linear(latent, 2 * dim) if latent else None
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, h: Float[Tensor, "B L dim"], real: Bool[Tensor, "B L"], z: Float[Tensor, " latent"] | None
    ) -> Float[Tensor, "B L dim"]:
        rows = asked = real_rows(h, real)
        if self.film is not None:
            gamma, beta = self.film(z).chunk(2)
            asked = rows * (1 + gamma) + beta
        interest = self.out(attend_rows(self.query(asked), self.key_value(rows), real, causal_mask(real), self.heads))
        state: Tensor = self.norm(padded(rows + self.dropout(interest), real))
        return state


class CDSRNP(Recommender):
    """See the module's docstring; every width and rate comes from `RunConfig`. With a latent it needs a support."""

    points: ClassVar = {
        0: "early, right after the embeddings",
        1: "mid, after the sequence encoders",
        2: "late, on the decoder's states",
    }
    needs_global_order: ClassVar = False

    @classmethod
    def build(cls, config: RunConfig, pair: Pair) -> Self:
        """A fresh model with its support set.

        Raises
        ------
        ValueError
            For a stack on a per-domain pair, or if no user can be support.
        """
        if not pair.has_global_order and len(config.gca) * config.gca_depth > 1:
            raise ValueError(
                f"gca={config.gca} with gca_depth={config.gca_depth} cannot be stacked on {pair.name}, a per-domain "
                "pair: without a global order, rows that one cross-attention has updated hold the future of the other "
                "domain, which the next would read back; give a single insertion point with gca_depth=1."
            )
        return cls(config, pair.num_items, None if config.latent == 0 else Support.draw(pair, config.seed))

    def __init__(self, config: RunConfig, num_items: tuple[int, int], support: Support | None = None) -> None:
        super().__init__(config, num_items)
        d = config.dim
        latent = d if config.latent is None else config.latent
        # a user's newest row of each domain, whether or not it predicts: for cross-attention and for the triples
        self.keep_last_item = bool(config.gca) or latent > 0
        self.support = support
        self._z: Tensor | None = None  # the prior's mean, while in evaluation mode

        self.item = nn.Embedding(1 + sum(num_items), d, padding_idx=0)
        self.position = nn.ModuleList(nn.Embedding(1 + self.window, d, padding_idx=0) for _ in "ab")
        self.dropout = Dropout(config.dropout)
        self.encoder = nn.ModuleList(
            TransformerEncoder(d, LAYERS, config.self_heads, config.dropout, config.hidden) for _ in "ab"
        )
        self.decoder = nn.ModuleList(InterestDecoder(d, config.self_heads, latent, config.dropout) for _ in "ab")
        self.latent = LatentEncoder(d, latent) if latent else None
        self.apply(start_small)
        for module in self.modules():
            if isinstance(module, InterestDecoder) and module.film is not None:
                nn.init.zeros_(module.film.weight)  # z says nothing at first, when it is mostly noise
        # made last, so that a seed gives the plain model the same initial weights with and without them
        self.gca = CrossDomainAttention(config)

    def forward(self, batch: Batch, z: Float[Tensor, " latent"] | None = None) -> States:
        """States that predict; `z` instead of the sample or the prior's mean, if given."""
        h = self.encode(batch)
        if z is None and self.latent is not None:
            z = self.distributions(batch, h)[1].sample() if self.training else self.prior_mean()
        a, b = self.decode(batch, h, z)
        return (a, b) if batch.training else (batch.a.newest(a), batch.b.newest(b))

    def encode(self, batch: Batch) -> States:
        """Rows of the two domains after the sequence encoders, zero at pads."""
        a, b = (
            self.dropout(h * self.config.dim**0.5 + position(s.recency))
            for h, s, position in zip(self.embedded(*batch.domains), batch.domains, self.position, strict=True)
        )
        a, b = self.gca(EARLY, (a, b), batch)
        a, b = (
            encoder(h, s.mask, causal_mask(s.mask))
            for encoder, h, s in zip(self.encoder, (a, b), batch.domains, strict=True)
        )
        return self.gca(MID, (a, b), batch)

    def distributions(self, batch: Batch, h: States) -> tuple[Gaussian, Gaussian]:
        """Prior, given a random part of the support, and posterior, given that and the batch's users."""
        assert self.latent is not None and self.support is not None
        known = self.support_triples(torch.randperm(len(self.support.users))[:STEP_SUPPORT].tolist())
        return self.latent(known), self.latent(known, self.triples(batch, h))

    @torch.no_grad()
    def prior_mean(self) -> Float[Tensor, " latent"]:
        """The z of evaluation, given all of the support; kept until mode, type, device or loaded weights change."""
        if self._z is None:
            assert self.latent is not None and self.support is not None
            self._z = self.latent(self.support_triples(list(range(len(self.support.users))))).mean
        return self._z

    def train(self, mode: bool = True) -> Self:
        self._z = None
        return super().train(mode)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        self._z = None
        return super().load_state_dict(*args, **options)

    def _apply(self, *args: Any, **options: Any) -> Self:
        self._z = None  # what `.to`, `.double` and the like go through
        return super()._apply(*args, **options)

    def decode(self, batch: Batch, h: States, z: Float[Tensor, " latent"] | None) -> States:
        """The state of every row of the two domains, given z."""
        a, b = (decode(x, s.mask, z) for decode, x, s in zip(self.decoder, h, batch.domains, strict=True))
        return self.gca(LATE, (a, b), batch)

    def loss(self, batch: Batch, negatives: Tensor) -> dict[str, Tensor]:
        """Loss of each domain, and `"kl"` unless latent is 0."""
        h = self.encode(batch)
        z, losses = None, {}
        if self.latent is not None:
            prior, posterior = self.distributions(batch, h)
            z, losses["kl"] = posterior.sample(), posterior.kl(prior)
        return losses | self.next_item_losses(self.decode(batch, h, z), batch, negatives)

    def facts(self) -> dict[str, Any]:
        """Size of the support set and a hash of its users' numbers."""
        if self.support is None:
            return {}
        digest = hashlib.sha256(self.support.users.astype("<i8").tobytes()).hexdigest()
        return {"support_users": len(self.support.users), "support_sha256": digest}

    @torch.no_grad()
    def support_triples(self, places: list[int]) -> Float[Tensor, "triples three_dim"]:
        """The triples of some users of the support set."""
        assert self.support is not None
        batch = collate(
            [self.support.histories[place] for place in places], self.num_items[0], window=self.window, training=True,
            keep_last_item=True, global_order=self.support.has_global_order,
        ).to(self.item.weight.device)  # fmt: skip
        with recording_paused(self):
            return self.triples(batch, self.encode(batch))

    @torch.no_grad()
    def triples(self, batch: Batch, h: States) -> Float[Tensor, "triples three_dim"]:
        """`[A representation ; B representation ; E[target]]` of each user's (per-domain: each domain's) last event."""
        a, b = (stream.newest(x)[:, 0] * stream.newest_mask for stream, x in zip(batch.domains, h, strict=True))
        inputs = batch.mixed.mask.sum(dim=1)
        users, targets = [], []
        for stream in batch.domains:
            columns = torch.arange(stream.items.size(1), device=inputs.device)
            last = (columns * stream.predicts).amax(dim=1)
            rows = torch.arange(batch.size, device=inputs.device)
            asked = stream.predicts[rows, last] & ((stream.query_position[rows, last] == inputs - 1) | (inputs == 0))
            users.append(asked.nonzero().squeeze(1))
            targets.append(stream.targets[rows, last][asked])
        who = torch.cat(users)
        return torch.cat([a[who], b[who], self.item(torch.cat(targets))], dim=1)
