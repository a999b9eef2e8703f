"""Baselines that count in the training histories and learn nothing: what a trained model has to beat.

    popularity   an item's training events
    markov       how often the item came right after the user's last one
    item-knn     cosine similarities to the items of the user's history, added up (Sarwar et al., WWW 2001)

A state is what a user is known by: the counts of the items of the history (item-knn), the last item alone (markov), or
a constant. Scores are sparse products of it with a table of counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from gcalib.config import RunConfig
from gcalib.data.batches import Batch, items_of
from gcalib.data.pair import Pair
from gcalib.models.base import Recommender, States


def counts(pair: Pair) -> np.ndarray:
    """float32 (1 + nA + nB,), training events of each item."""
    return np.bincount(pair.split("val").history_items, minlength=1 + sum(pair.num_items)).astype(np.float32)


def transitions(pair: Pair) -> sparse.csr_array:
    """float32 (1 + nA + nB, 1 + nA + nB): how often column came right after row in a training history."""
    owner, items = _training_events(pair)
    sequence = owner if pair.has_global_order else owner * 2 + pair.domain_of(items)
    steps = np.flatnonzero(sequence[1:] == sequence[:-1])
    shape = (1 + sum(pair.num_items),) * 2
    return sparse.coo_array((np.ones(len(steps), np.float32), (items[steps], items[steps + 1])), shape).tocsr()


def similarities(pair: Pair) -> sparse.csr_array:
    """float32 (1 + nA + nB, 1 + nA + nB): cosines of items' columns in the binary user-item matrix of both domains."""
    owner, items = _training_events(pair)
    shape = pair.num_users, 1 + sum(pair.num_items)
    bought = sparse.coo_array((np.ones(len(items), np.float32), (owner, items)), shape).tocsr()
    bought.data[:] = 1  # whatever was bought twice
    unit = bought @ sparse.diags_array(1 / np.sqrt(np.maximum(bought.sum(axis=0), 1)).astype(np.float32))
    return (unit.T @ unit).tocsr()


def _training_events(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """User and item of every training event."""
    training = pair.split("val")
    return np.repeat(np.arange(pair.num_users), training.lengths), training.history_items


class CountingBaseline(Recommender):
    """A sparse table of scores (1 + nA + nB, 1 + nA + nB): what each item of a history is worth to each candidate.

    With a single row, what the candidates are worth whatever the history.
    """

    trained = False
    needs_global_order: ClassVar = False

    def __init__(self, config: RunConfig, num_items: tuple[int, int], table: sparse.csr_array) -> None:
        super().__init__(config, num_items)
        self.window = config.max_length
        self.table = table

    @classmethod
    def build(cls, config: RunConfig, pair: Pair) -> Self:
        if config.model == "popularity":
            return cls(config, pair.num_items, sparse.csr_array(counts(pair)[None, :]))
        return cls(config, pair.num_items, transitions(pair) if config.model == "markov" else similarities(pair))

    def forward(self, batch: Batch) -> States:
        """(B, 1, rows of the table); the last item is the domain's own where there is no global order."""
        states = []
        for own in batch.domains:
            state = torch.zeros(batch.size, self.table.shape[0], device=own.items.device)
            if self.config.model == "popularity":
                state[:] = 1
            elif self.config.model == "markov":
                newest = batch.mixed if batch.mixed.mask.any() else own
                state.scatter_(1, newest.items.gather(1, newest.last.unsqueeze(1)), 1.0)
            else:
                for stream in batch.domains:
                    state.scatter_add_(1, stream.items, torch.ones_like(stream.items, dtype=state.dtype))
            if state.size(1) > 1:
                state[:, 0] = 0  # pads
            states.append(state.unsqueeze(1))
        return states[0], states[1]

    def scorer(self, domain: int) -> Callable[[Tensor], Tensor]:
        table = self.table[:, items_of(self.num_items, domain)]

        def scores(states: Tensor) -> Tensor:
            product = sparse.csr_array(states.cpu().numpy()) @ table
            return torch.from_numpy(product.toarray().astype(np.float32)).to(states.device)

        return scores
