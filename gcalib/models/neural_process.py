"""What makes CDSRNP a neural process: the support set, the Gaussian made of users' triples, and the decoder given z.

A neural process (Garnelo et al. 2018, arXiv 1807.01622) turns a set of observations into a distribution of a latent z,
by a mean that does not depend on their order, and trains it by holding the distribution given a part of them (the
prior) against the one given all (the posterior).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gcalib.data.pair import Pair
from gcalib.layers import Dropout, attend, merge_heads, split_heads
from gcalib.packing import Layout


@dataclass(frozen=True, eq=False)
class Support:
    """Users of the support set, by number, and their training histories."""

    users: np.ndarray
    histories: list[np.ndarray]
    has_clock: bool

    @classmethod
    def draw(cls, pair: Pair, size: int, seed: int) -> Support:
        """`size` users (all, if there are fewer) whose training history gives a triple with both domains.

        Raises
        ------
        ValueError
            If no user has both domains in training.
        """
        training = pair.split("val")
        fit = np.array([_has_triple(pair, training.history(user)) for user in range(pair.num_users)])
        able = np.flatnonzero(fit)
        if not len(able):
            raise ValueError(
                f"{pair.name} has no user with both domains in training, so there is no support set: cdsrnp needs one, "
                "or latent=0."
            )
        drawn = np.sort(np.random.default_rng([seed, 2]).choice(able, min(size, len(able)), replace=False))
        return cls(drawn, [training.history(user) for user in drawn], pair.has_clock)

    @cached_property
    def sha256(self) -> str:
        """Hash of the drawn users' numbers."""
        return hashlib.sha256(self.users.astype("<i8").tobytes()).hexdigest()


def _has_triple(pair: Pair, history: np.ndarray) -> bool:
    """Whether both domains have a row, and a target follows: the last event is one, without a clock of each domain."""
    counts = np.bincount(pair.domain_of(history[:-1] if pair.has_clock else history), minlength=2)
    return bool(counts.min() > 0 and (pair.has_clock or counts.max() > 1))


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
        """The distribution given all triples."""
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
        self, h: Float[Tensor, "rows dim"], layout: Layout, z: Float[Tensor, " latent"] | None
    ) -> Float[Tensor, "rows dim"]:
        asked = h
        if self.film is not None:
            gamma, beta = self.film(z).chunk(2)
            asked = h * (1 + gamma) + beta
        q = split_heads(layout.pad(self.query(asked)), self.heads)
        k, v = (split_heads(t, self.heads) for t in layout.pad(self.key_value(h)).chunk(2, dim=-1))
        interest = self.out(layout.unpad(merge_heads(attend(q, k, v, causal=True))))
        state: Tensor = self.norm(h + self.dropout(interest))
        return state
