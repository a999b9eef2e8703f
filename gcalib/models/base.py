"""What every model offers to training, evaluation and measurement, and the loss that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gcalib.data.batches import Batch


class Recommender(nn.Module, ABC):
    """A model of users' next items in two domains, A (0) and B (1).

    Attributes
    ----------
    num_items
        Items of A and of B; ids 1..nA are A's, nA+1..nA+nB are B's, 0 is padding.
    window
        Events of a history that the model looks at, the newest ones.
    as_published, reads_tails
        Passed on to `make_batch` (as `as_published` and `tails`).
    """

    num_items: tuple[int, int]
    window: int
    as_published: bool
    reads_tails: bool

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Float[Tensor, "queries_a dim"], Float[Tensor, "queries_b dim"]]:
        """States that predict: in training one for each query of `batch`, in evaluation one a user, in A and in B."""

    @abstractmethod
    def item_vectors(self, domain: int) -> Float[Tensor, "items dim"]:
        """Vectors of a domain's items, in order of id: the score of an item is its dot product with a state."""

    @abstractmethod
    def loss(self, batch: Batch, negatives: Int[Tensor, " negatives"]) -> tuple[Tensor, Tensor]:
        """Training loss of both domains against negatives (item ids of either domain) shared by the batch."""


def info_nce(
    positive: Float[Tensor, " queries"],
    negative: Float[Tensor, "queries negatives"],
    weight: Float[Tensor, " queries"],
) -> Float[Tensor, ""]:
    """Weighted sum of `-log softmax` of the positive logit among itself and the negatives (van den Oord 2018)."""
    normaliser = torch.logaddexp(positive, negative.logsumexp(dim=1))
    return ((normaliser - positive) * weight).sum()


def mean_per_user(sequence: Int[Tensor, " queries"], batch_size: int) -> Float[Tensor, " queries"]:
    """Weights that average a user's queries first and the users of the batch afterwards.

    >>> mean_per_user(torch.tensor([0, 0, 2]), 4)
    tensor([0.1250, 0.1250, 0.2500])
    """
    counts = torch.bincount(sequence, minlength=batch_size)
    return 1.0 / (counts[sequence] * batch_size)
