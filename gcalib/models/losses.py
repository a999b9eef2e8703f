"""Losses and sampled negatives that the models share.

Everything here works on predictions (N,): the rows of a batch where a model is asked for the next item.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gcalib.data.batches import Batch

REDRAWS = 20  # of a negative that the user has; not without end, since a user may have the whole domain


def draw_negatives(rng: np.random.Generator, num_items: tuple[int, int], count: int) -> Int[Tensor, " negatives"]:
    """Item ids, half from each domain (or the whole domain where it is smaller), none twice."""
    nA, nB = num_items
    drawn = [rng.choice(size, min(size, count // 2), replace=False, shuffle=False) for size in (nA, nB)]
    return torch.from_numpy(np.concatenate([1 + drawn[0], 1 + nA + drawn[1]]))


def draw_new_to_users(rng: np.random.Generator, num_items: tuple[int, int], batch: Batch) -> tuple[Tensor, Tensor]:
    """One item id for each prediction of A and of B, of its domain, that is none of its user's items."""
    nA, nB = num_items
    key = 1 + nA + nB  # of a user and an item
    bought = batch.history_items.cpu().numpy() + key * np.arange(batch.size)[:, None]
    drawn = []
    for first, size, stream in zip((1, 1 + nA), num_items, batch.domains, strict=True):
        user = stream.predicts.nonzero()[:, 0].cpu().numpy()
        sampled = rng.integers(first, first + size, len(user))
        for _ in range(REDRAWS):
            again = np.flatnonzero(np.isin(user * key + sampled, bought))
            if len(again) == 0:
                break
            sampled[again] = rng.integers(first, first + size, len(again))
        drawn.append(torch.from_numpy(sampled))
    return drawn[0], drawn[1]


def shared_logits(
    states: Float[Tensor, "N dim"],
    targets: Int[Tensor, " N"],
    target_vectors: Float[Tensor, "N dim"],
    negatives: Int[Tensor, "pools negatives"],
    negative_vectors: Float[Tensor, "pools negatives dim"],
    excluded: Int[Tensor, "N items"] | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N negatives"]]:
    """Scores of each prediction's target and of its pool of negatives, by one matrix product.

    The predictions are cut into as many parts of equal length as there are pools. A target among the negatives of its
    own prediction scores minus infinity there, and so do the items that `excluded` lists for it (0 is none). A pool
    may name an item only once.
    """
    positive = (states * target_vectors).sum(dim=1)
    pools, count = negatives.shape
    if count == 0:
        return positive, states.new_zeros(len(states), 0)
    size = -(-len(states) // pools)
    spare = pools * size - len(states)
    parts = F.pad(states, (0, 0, 0, spare)).view(pools, size, states.size(1))
    # the softmax over a thousand negatives needs more digits than bf16 has
    scores = (parts @ negative_vectors.transpose(1, 2)).to(positive.dtype)
    negative = scores.view(pools * size, count)[: len(states)]

    hidden = targets.unsqueeze(1) if excluded is None else torch.cat([targets.unsqueeze(1), excluded], dim=1)
    ordered, column = negatives.sort()
    wanted = F.pad(hidden, (0, 0, 0, spare)).view(pools, -1)
    found = torch.searchsorted(ordered, wanted).clamp_(max=count - 1)
    hit = (ordered.gather(1, found) == wanted).view(-1)[: hidden.numel()].nonzero().squeeze(1)
    place = (hit // hidden.size(1), column.gather(1, found).view(-1)[hit])
    return positive, negative.index_put(place, negative.new_tensor(float("-inf")))


def info_nce(
    positive: Float[Tensor, " N"], negative: Float[Tensor, "N negatives"], weight: Float[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Weighted sum of `-log softmax` of the positive logit among itself and the negatives (van den Oord 2018)."""
    normaliser = torch.logaddexp(positive, negative.logsumexp(dim=1))
    return ((normaliser - positive) * weight).sum()


def binary_cross_entropy(
    positive: Float[Tensor, " N"], negative: Float[Tensor, "N negatives"], weight: Float[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Weighted sum of `-log sigmoid(positive)` and the mean `-log sigmoid(-negative)` (Kang & McAuley 2018, eq. 6).

    Theirs has one negative per target; here there may be many, which are averaged. One at minus infinity (see
    `shared_logits`) does not count.
    """
    real: Bool[Tensor, "N negatives"] = torch.isfinite(negative)
    wrong = F.softplus(negative).sum(dim=1) / real.sum(dim=1).clamp(min=1)
    return ((F.softplus(-positive) + wrong) * weight).sum()


def soft_contrast(x: Float[Tensor, "users dim"], y: Float[Tensor, "users dim"]) -> Float[Tensor, ""]:
    """Contrast of two views of the same users with soft targets, at temperature 1 (LLM4CDSR, arXiv 2504.18383).

        S = X Y^T,  T = softmax((X X^T + Y Y^T) / 2)
        mean over rows of  (T . -log softmax(S) + T^T . -log softmax(S^T)) / 2

    What is alike within the views may stay alike across them. Zero for no users.

    >>> soft_contrast(torch.zeros(4, 2), torch.ones(4, 2)).item() == torch.tensor(4.0).log().item()
    True
    """
    if len(x) == 0:
        return x.sum()
    if x.dtype == torch.bfloat16 or y.dtype == torch.bfloat16:
        x, y = x.float(), y.float()
    with torch.autocast(x.device.type, enabled=False):
        logits = x @ y.T
        alike = ((x @ x.T + y @ y.T) / 2).softmax(dim=1)
    of_x = -(alike * logits.log_softmax(dim=1)).sum(dim=1)
    of_y = -(alike.T * logits.T.log_softmax(dim=1)).sum(dim=1)
    return (of_x + of_y).mean() / 2


def mean_per_user(user: Int[Tensor, " N"], batch_size: int) -> Float[Tensor, " N"]:
    """Weights that average a user's predictions first and the users of the batch afterwards.

    >>> mean_per_user(torch.tensor([0, 0, 2]), 4)
    tensor([0.1250, 0.1250, 0.2500])
    """
    counts = torch.bincount(user, minlength=batch_size)
    return 1.0 / (counts[user] * batch_size)
