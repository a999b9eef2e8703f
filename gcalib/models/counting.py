"""Yardsticks as models: they count in the training histories, learn nothing, and are evaluated like any other.

    popularity   an item's training events
    markov       how often the item came right after the user's last one
    item-knn     cosine similarities to the items of the user's history, added up (Sarwar et al., WWW 2001)

A state is what a user is known by: the counts of the items of the history (item-knn), the last item alone (markov), or
nothing at all. Scores are sparse products of it with a table of counts (`gcalib.yardsticks`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

from gcalib import yardsticks
from gcalib.config import RunConfig
from gcalib.data.batches import Batch
from gcalib.data.pair import Pair
from gcalib.models.base import Recommender


class Counting(Recommender):
    """A table of scores, item by item, of training counts; `training` has no meaning for it.

    Parameters
    ----------
    table
        Sparse (1 + nA + nB, 1 + nA + nB): what each item of a history is worth to each candidate; with a single row,
        what the candidates are worth whatever the history.
    newest_only
        Whether the last item alone speaks.
    """

    trained = False
    needs_clock: ClassVar = False
    num_negatives = 0

    def __init__(
        self, config: RunConfig, num_items: tuple[int, int], table: sparse.csr_array, newest_only: bool
    ) -> None:
        super().__init__()
        self.num_items = num_items
        self.window = config.max_length
        self.table = table
        self.newest_only = newest_only

    @classmethod
    def build(cls, config: RunConfig, pair: Pair) -> Self:
        if config.model == "popularity":
            return cls(config, pair.num_items, sparse.csr_array(yardsticks.counts(pair)[None, :]), newest_only=True)
        table = yardsticks.transitions(pair) if config.model == "markov" else yardsticks.similarities(pair)
        return cls(config, pair.num_items, table, newest_only=config.model == "markov")

    def forward(self, batch: Batch) -> tuple[Float[Tensor, "users items"], Float[Tensor, "users items"]]:
        """Counts of what each user is known by; without a common clock, the last item is the domain's."""
        states = []
        for stream, queries in zip(batch.own, batch.queries, strict=True):
            state = torch.zeros(batch.size, self.table.shape[0], device=stream.items.device)
            newest = queries.newest()
            if self.table.shape[0] == 1:
                state[:] = 1
            elif not self.newest_only:
                for own in batch.own:
                    state.index_put_((own.sequence, own.items), state.new_ones(len(own.items)), accumulate=True)
            elif len(batch.mixed.items):
                state[newest.sequence, batch.mixed.items[newest.mixed_row]] = 1
            else:
                has = newest.own_row >= 0
                state[newest.sequence[has], stream.items[newest.own_row[has]]] = 1
            states.append(state)
        return states[0], states[1]

    def item_vectors(self, domain: int) -> Float[Tensor, "items dim"]:
        first, size = 1 + domain * self.num_items[0], self.num_items[domain]
        return torch.from_numpy(self.table[:, first : first + size].T.toarray())

    def scorer(self, domain: int) -> Callable[[Tensor], Tensor]:
        first, size = 1 + domain * self.num_items[0], self.num_items[domain]
        table = self.table[:, first : first + size]

        def scores(states: Tensor) -> Tensor:
            product = sparse.csr_array(states.cpu().numpy()) @ table
            return torch.from_numpy(product.toarray().astype(np.float32)).to(states.device)

        return scores

    def loss(self, batch: Batch, negatives: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError("Counting models have nothing to train.")
