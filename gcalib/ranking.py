"""From scores to ranks, and from ranks to HR, NDCG, MRR and AUC.

One protocol question decides every figure made here: which items compete with the target. `rank_of_target` lets a whole
domain compete (`full`), less what the user interacted with already; `rank_among` a few sampled items (`s999`, `s100`).
The two can disagree on which model is better (Krichene and Rendle, KDD 2020), so the package reports both.

Ties share the places they take: rank = 1 + number strictly better + half the number equal. It is the expected rank when
ties are broken at random, so a model that gives every item the same score ranks in the middle instead of winning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import gammaln
from torch import Tensor

CUTOFFS = (1, 5, 10, 20)
BLOCK = 2**15  # scores compared at a time on a CPU: they stay in the cache, and torch spreads so few over no threads
Numbers = Sequence[float] | np.ndarray | Tensor
Items = tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]] | Bool[Tensor, "users items"]


@torch.no_grad()
def rank_of_target(
    scores: Float[Tensor, "users items"], target: Int[Tensor, " users"], excluded: Items | None = None
) -> Float[Tensor, " users"]:
    """Rank of each user's target among all items, less those excluded (protocol `full`).

    Parameters
    ----------
    scores
        (users, items), higher is better. Minus infinity, as `gcalib.score` gives to padding, never wins.
    target
        (users,), column of each user's target.
    excluded
        Items that do not compete, as (row, column) pairs in any order or as a mask; usually the user's own history.
        A pair given twice counts once, and the target competes even if it is listed.

    Returns
    -------
    float64 (users,), from 1, in steps of one half.

    Raises
    ------
    ValueError
        If a score is nan or infinity, a target's is minus infinity, or shapes or indices do not fit.

    Examples
    --------
    Two items beat the target, one of which the user knows already; one item ties with it.

    >>> scores = torch.tensor([[-math.inf, 0.9, 0.8, 0.5, 0.5, 0.1]])
    >>> rank_of_target(scores, torch.tensor([3]))
    tensor([3.5000], dtype=torch.float64)
    >>> rank_of_target(scores, torch.tensor([3]), (torch.tensor([0]), torch.tensor([1])))
    tensor([2.5000], dtype=torch.float64)
    """
    _check_shapes(scores, target)
    users, items = scores.shape
    _check_index("target", target, items)
    of_target = scores.gather(1, target.long().unsqueeze(1))
    rank = 0.5 + _ahead(scores, of_target)  # the target, tied with itself, is one half of those ahead
    if excluded is not None:  # these few scores are looked up and taken off again
        row, column = excluded.expand_as(scores).nonzero(as_tuple=True) if isinstance(excluded, Tensor) else excluded
        _check_index("excluded rows", row, users)
        _check_index("excluded columns", column, items)
        once = torch.unique(row.long() * items + column)
        row, column = once // items, once % items
        ahead = (1 + torch.sign(scores[row, column] - of_target[row, 0]).double()) / 2
        rank.index_add_(0, row, ahead.where(column != target[row], 0.0), alpha=-1)
    return rank


@torch.no_grad()
def rank_among(
    target_scores: Float[Tensor, " users"], candidate_scores: Float[Tensor, "users candidates"]
) -> Float[Tensor, " users"]:
    """Rank of each user's target among sampled candidates, the target not being one of them (protocols `s999`, `s100`).

    Ranks and errors are those of `rank_of_target`. Gather both scores, (users,) and (users, candidates), from one
    matrix product: the same dot product computed twice may differ in its last bits, and hide a tie.

    >>> rank_among(torch.tensor([0.5]), torch.tensor([[0.9, 0.5, 0.1]]))
    tensor([2.5000], dtype=torch.float64)
    """
    _check_shapes(candidate_scores, target_scores)
    return 1 + _ahead(candidate_scores, target_scores.unsqueeze(1))


def _ahead(scores: Tensor, of_target: Tensor) -> Tensor:
    """Number of scores above the target's, (users, 1), and half of those equal to it; float64 (users,).

    With G above, E equal and L below of n, it is (n + G - L) / 2: one pass over the signs. Exact up to 2^24 items.
    """
    for row in (~of_target.isfinite()).nonzero()[:1, 0].tolist():
        raise ValueError(f"The target's score in row {row} is {of_target[row].item()}; it must be finite.")
    step = max(1, BLOCK // max(1, scores.shape[1])) if scores.device.type == "cpu" else max(1, len(scores))
    lead, total = torch.empty(2, len(scores), device=scores.device)
    buffer = torch.empty_like(scores[:step])
    blocks = zip(*(part.split(step) for part in (scores, of_target, lead, total)), strict=True)
    for score, compared, lead_of, total_of in blocks:
        difference = torch.sub(score, compared, out=buffer[: len(score)])
        torch.sum(difference, dim=1, dtype=torch.float32, out=total_of)
        torch.sum(difference.sign_(), dim=1, dtype=torch.float32, out=lead_of)
    if not (total < math.inf).all():  # because of a score that is refused, or an overflow of finite ones
        for row, column in (scores.isnan() | (scores == math.inf)).nonzero()[:1].tolist():
            raise ValueError(f"The score in row {row}, column {column} is {scores[row, column]}; it cannot be ranked.")
    return (scores.shape[1] + lead.double()) / 2


def _check_shapes(scores: Tensor, target: Tensor) -> None:
    if scores.dim() != 2 or target.shape != scores.shape[:1]:
        raise ValueError(f"scores {list(scores.shape)}, targets {list(target.shape)}: must be [users, items], [users].")


def _check_index(name: str, index: Tensor, size: int) -> None:
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(f"{name} holds indices from {int(index.min())} to {int(index.max())}, outside 0..{size - 1}.")


def metrics(ranks: Numbers, num_candidates: int | Numbers) -> dict[str, float]:
    """Ranking metrics averaged over users, each of whom has one target; all from 0 (worst) to 1.

    - `hr@k`: share of ranks up to k, for k in 1, 5, 10, 20 (hit rate; with one target recall and success at k).
    - `ndcg@k`: mean of `1 / log2(rank + 1)` where rank is up to k, else 0 (Jarvelin and Kekalainen 2002; ideal gain 1).
    - `mrr`: mean of `1 / rank`.
    - `auc`: mean of `(n - rank) / (n - 1)`, the share of other candidates that the target beats, ties counting half.

    A rank ending in one half (ties) is taken as it is: two items that share the first place, 1.5, are no hit at 1.

    Parameters
    ----------
    ranks, num_candidates
        (users,), from 1; and how many items were ranked, the target included (`s999` has 1000): a number, or (users,).

    Raises
    ------
    ValueError
        If there are no ranks, a rank is below 1 or beyond the number of candidates, or that number is below 2.

    Examples
    --------
    Three users whose targets came first, third and twelfth of a hundred: NDCG@5 is (1 + 1/log2(4) + 0) / 3.

    >>> found = metrics([1, 3, 12], 100)
    >>> {name: round(found[name], 3) for name in ("hr@1", "hr@5", "ndcg@5", "mrr", "auc")}
    {'hr@1': 0.333, 'hr@5': 0.667, 'ndcg@5': 0.5, 'mrr': 0.472, 'auc': 0.956}
    """
    return {name: float(values.mean()) for name, values in per_user(ranks, num_candidates).items()}


def per_user(ranks: Numbers, num_candidates: int | Numbers) -> dict[str, np.ndarray]:
    """The metrics of each user before the mean: float64 arrays (users,), for paired tests of two models over users.

    Arguments, names and errors are those of `metrics`; `pandas.DataFrame(per_user(...))` has one row a user.

    >>> per_user([1, 3], 5)["auc"]
    array([1. , 0.5])
    """
    rank, size = _as_array(ranks), _as_array(num_candidates)
    if rank.ndim != 1 or len(rank) == 0 or size.shape not in ((), rank.shape):
        raise ValueError(f"ranks {rank.shape} and num_candidates {size.shape} must be a list, and a number or as many.")
    size = np.broadcast_to(size, rank.shape)
    for user in np.flatnonzero(~((rank >= 1) & (rank <= size) & (size >= 2)))[:1]:
        raise ValueError(f"User {user} has rank {rank[user]:g} of {size[user]:g}; it must be 1 to n, with n 2 or more.")
    found = {}
    for k in CUTOFFS:
        found[f"hr@{k}"] = (rank <= k).astype(np.float64)
        found[f"ndcg@{k}"] = found[f"hr@{k}"] / np.log2(rank + 1)
    return {**found, "mrr": 1 / rank, "auc": (size - rank) / (size - 1)}


def expected(ranks: Numbers, num_candidates: int | Numbers, negatives: int) -> dict[str, float]:
    """The metrics of a sampled protocol in the mean over all draws of its candidates, without drawing any.

    Of a target that G of N other candidates beat, the number H of those that beat it among n drawn without
    replacement is hypergeometric, so that its rank is 1 + H and

        E[hr@k] = P(H < k)
        E[ndcg@k] = sum over h < k of P(H = h) / log2(h + 2)
        E[1 / rank] = (N + 1) / ((G + 1) (n + 1)) P(H' > 0),  H' of G + 1 among N + 1, n + 1 drawn
        E[auc] = 1 - G / N, the AUC among all

    How one draw, kept for all runs, differs from this mean averages out over users only, not over seeds. A rank ending
    in one half (ties) counts as the mean of the two whole ranks beside it, which is exact for two items that tie.

    Parameters
    ----------
    ranks, num_candidates
        Ranks among all candidates (`full`). They, the names returned and the errors are those of `metrics`.
    negatives
        Number n of other items that the sampled protocol draws; each number of candidates must be above it.

    Examples
    --------
    A target beaten by one of two others: drawn alone, that one comes up half of the time.

    >>> found = expected([2], 3, negatives=1)
    >>> {name: found[name] for name in ("hr@1", "mrr", "auc")}
    {'hr@1': 0.5, 'mrr': 0.75, 'auc': 0.5}
    """
    auc = metrics(ranks, num_candidates)["auc"]  # checks them
    rank = _as_array(ranks)
    others = np.broadcast_to(_as_array(num_candidates), rank.shape)[:, None] - 1  # (users, 1)
    if negatives < 1 or others.min() < negatives:
        raise ValueError(f"negatives={negatives}; a target has only {others.min():g} other candidates to draw from.")
    better = np.stack([np.floor(rank), np.ceil(rank)])[:, :, None] - 1  # (2, users, 1)
    hits = np.arange(min(max(CUTOFFS), negatives + 1))
    chance = _hypergeometric(hits, others, better, negatives).mean(axis=(0, 1))  # (hits,)
    some = 1 - _hypergeometric(0, others + 1, better + 1, negatives + 1)
    mrr = float(((others + 1) / ((better + 1) * (negatives + 1)) * some).mean())
    values = {"hr": chance, "ndcg": chance / np.log2(hits + 2)}
    found = {f"{name}@{k}": float(of_hits[:k].sum()) for k in CUTOFFS for name, of_hits in values.items()}
    return {**found, "mrr": mrr, "auc": auc}


def _hypergeometric(hits: np.ndarray | int, total: np.ndarray, marked: np.ndarray, drawn: int) -> np.ndarray:
    """Chance of so many marked ones among those drawn; `scipy.stats.hypergeom.pmf` takes 500 times as long."""
    # Right to some 1e-10 of the value for totals in the ten thousands. Where k > n, the last gammaln is infinite.
    choices = ((marked, hits, 1), (total - marked, drawn - hits, 1), (total, drawn, -1))
    return np.exp(sum(sign * (gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)) for n, k, sign in choices))


def _as_array(values: int | Numbers) -> np.ndarray:
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
