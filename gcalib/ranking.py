"""From scores to ranks, and from ranks to HR, NDCG, MRR and AUC.

One protocol question decides every figure made here: which items compete with the target. `rank_of_target` lets a whole
domain compete (`full`), less what the user interacted with already; `rank_among` a few sampled items (`s999`, `s100`).
The two can disagree on which model is better (Krichene and Rendle, KDD 2020), so the package reports both, and the
protocol is part of a metric's name.

Ties share the places they take: rank = 1 + number strictly better + half the number equal. It is the expected rank when
ties are broken at random, so a model that gives every item the same score ranks in the middle instead of winning.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import gammaln
from torch import Tensor

CUTOFFS = (1, 5, 10, 20)
# Scores compared at a time on a CPU: they stay in the cache, and torch does not spread so few over threads, which would
# spend more time waiting for each other than counting, most of all when other processes want the cores too.
BLOCK = 2**15


def rank_of_target(
    scores: Float[Tensor, "users items"],
    target: Int[Tensor, " users"],
    excluded: tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]] | Bool[Tensor, "users items"] | None = None,
) -> Float[Tensor, " users"]:
    """Rank of each user's target among all items, less those excluded (protocol `full`).

    Costs a small share of the matrix product that made the scores: excluded items take part in one pass over the
    matrix like all others, and their few scores are looked up and taken off again.

    Parameters
    ----------
    scores
        One row a user; higher is better.
    target
        Column of each user's target.
    excluded
        Items that do not compete, as (row, column) pairs in any order or as a mask; usually the user's own history.
        A pair given twice counts once, and the target competes even if it is listed.

    Returns
    -------
    Tensor
        float64 (users,), from 1, in steps of one half.

    Raises
    ------
    ValueError
        If a score is not finite (the message says where), or shapes or indices do not fit.

    Examples
    --------
    Two items beat the target, one of which the user knows already; one item ties with it.

    >>> scores = torch.tensor([[0.9, 0.8, 0.5, 0.5, 0.1]])
    >>> rank_of_target(scores, torch.tensor([2]))
    tensor([3.5000], dtype=torch.float64)
    >>> rank_of_target(scores, torch.tensor([2]), (torch.tensor([0]), torch.tensor([1])))
    tensor([2.5000], dtype=torch.float64)
    """
    if scores.dim() != 2 or target.shape != scores.shape[:1]:
        raise ValueError(
            f"scores {tuple(scores.shape)} and target {tuple(target.shape)} must be (users, items) and (users,)."
        )
    users, items = scores.shape
    _check_index("target", target, items)
    of_target = scores.gather(1, target.long().unsqueeze(1))
    lead = _lead(scores, of_target)
    others = torch.full_like(lead, items - 1)
    if excluded is not None:
        row, column = _pairs(excluded, users, items)
        once = torch.unique(row * items + column)
        row, column = once // items, once % items
        kept = column != target[row]
        row, column = row[kept], column[kept]
        sign = torch.sign(scores[row, column] - of_target[row, 0]).double()
        lead.index_add_(0, row, sign, alpha=-1)
        others.index_add_(0, row, torch.ones_like(sign), alpha=-1)
    return 1 + (others + lead) / 2


def rank_among(
    target_scores: Float[Tensor, " users"], candidate_scores: Float[Tensor, "users candidates"]
) -> Float[Tensor, " users"]:
    """Rank of each user's target among sampled candidates, the target not being one of them (protocols `s999`, `s100`).

    Parameters
    ----------
    target_scores, candidate_scores
        Higher is better. Gather both from one matrix product: the same dot product computed twice may differ in its
        last bits, and ties then no longer look like ties.

    Returns
    -------
    Tensor
        float64 (users,), from 1, in steps of one half.

    Raises
    ------
    ValueError
        If a score is not finite, or the shapes do not fit.

    Examples
    --------
    >>> rank_among(torch.tensor([0.5]), torch.tensor([[0.9, 0.5, 0.1]]))
    tensor([2.5000], dtype=torch.float64)
    """
    if candidate_scores.dim() != 2 or target_scores.shape != candidate_scores.shape[:1]:
        raise ValueError(
            f"target_scores {tuple(target_scores.shape)} and candidate_scores {tuple(candidate_scores.shape)} "
            "must be (users,) and (users, candidates)."
        )
    # before the subtraction, where a NaN of the target would be blamed on the candidates
    _check_finite("target_scores", target_scores)
    lead = _lead(candidate_scores, target_scores.unsqueeze(1))
    return 1 + (candidate_scores.shape[1] + lead) / 2


def _lead(scores: Tensor, reference: Tensor) -> Tensor:
    """Number of scores above the reference less the number below it, a row; float64.

    With G above, E equal, L below and n = G + E + L it gives G + E / 2 = (n + G - L) / 2: ranks with halves for ties
    out of one pass instead of two. Counts are exact up to 2^24 items.
    """
    step = max(1, BLOCK // max(1, scores.shape[1])) if scores.device.type == "cpu" else max(1, len(scores))
    lead, total = (torch.empty(len(scores), device=scores.device) for _ in range(2))
    buffer = torch.empty_like(scores[:step])
    blocks = zip(*(part.split(step) for part in (scores, reference, lead, total)), strict=True)
    for score, compared, lead_of, total_of in blocks:
        difference = torch.sub(score, compared, out=buffer[: len(score)])
        torch.sum(difference, dim=1, dtype=torch.float32, out=total_of)
        torch.sum(difference.sign_(), dim=1, dtype=torch.float32, out=lead_of)
    # A NaN or an infinity shows in its row's total. So does an overflow of honest numbers, hence the closer look.
    if not torch.isfinite(total).all():
        _check_finite("scores", scores)
    return lead.double()


def _check_finite(name: str, scores: Tensor) -> None:
    bad = (~torch.isfinite(scores)).nonzero()
    if len(bad):
        where = bad[0].tolist()
        raise ValueError(f"{name} holds {scores[tuple(where)].item()} at {where}; a rank needs finite scores.")


def _check_index(name: str, index: Tensor, size: int) -> None:
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(f"{name} holds indices from {int(index.min())} to {int(index.max())}, outside 0..{size - 1}.")


def _pairs(excluded: tuple[Tensor, Tensor] | Tensor, users: int, items: int) -> tuple[Tensor, Tensor]:
    if isinstance(excluded, Tensor):
        if excluded.dtype != torch.bool or excluded.shape != (users, items):
            raise ValueError(
                f"excluded is {excluded.dtype} {tuple(excluded.shape)}; a mask must be torch.bool ({users}, {items})."
            )
        row, column = excluded.nonzero(as_tuple=True)
        return row, column
    row, column = excluded
    if row.dim() != 1 or row.shape != column.shape:
        raise ValueError(f"excluded names {tuple(row.shape)} rows and {tuple(column.shape)} columns, not as many.")
    _check_index("excluded rows", row, users)
    _check_index("excluded columns", column, items)
    return row.long(), column.long()


def metrics(
    ranks: Sequence[float] | np.ndarray | Tensor, num_candidates: int | Sequence[int] | np.ndarray | Tensor
) -> dict[str, float]:
    """Ranking metrics averaged over users, each of whom has one target.

    - `hr@k`: share of ranks up to k (hit rate; with one target it is recall and success at k).
    - `ndcg@k`: mean of `1 / log2(rank + 1)` where rank is up to k, else 0 (Jarvelin and Kekalainen 2002; one target,
      so that the ideal gain is 1).
    - `mrr`: mean of `1 / rank`.
    - `auc`: mean of `(n - rank) / (n - 1)`, the share of other candidates that the target beats, ties counting half.

    A rank ending in one half (ties) goes into the formulas as it is: two items that share the first place have rank
    1.5 and are no hit at 1.

    Parameters
    ----------
    ranks
        One a user, from 1.
    num_candidates
        How many items were ranked, the target included (`s999` has 1000): one number, or one a user.

    Returns
    -------
    dict
        `hr@k` and `ndcg@k` for k in 1, 5, 10, 20, then `mrr` and `auc`; all from 0 (worst) to 1.

    Raises
    ------
    ValueError
        If there are no ranks, a rank is below 1 or beyond the number of candidates, or that number is below 2.

    Examples
    --------
    Three users whose targets came first, third and twelfth of a hundred.

    >>> found = metrics([1, 3, 12], 100)
    >>> {name: round(found[name], 3) for name in ("hr@1", "hr@5", "ndcg@5", "mrr", "auc")}
    {'hr@1': 0.333, 'hr@5': 0.667, 'ndcg@5': 0.5, 'mrr': 0.472, 'auc': 0.956}

    NDCG@5 is (1 + 1/log2(4) + 0) / 3. A constant scorer puts the target of 100 candidates at 50.5:

    >>> found = metrics([50.5], 100)
    >>> found["hr@20"], found["auc"]
    (0.0, 0.5)
    """
    return {name: float(values.mean()) for name, values in per_user(ranks, num_candidates).items()}


def per_user(
    ranks: Sequence[float] | np.ndarray | Tensor, num_candidates: int | Sequence[int] | np.ndarray | Tensor
) -> dict[str, np.ndarray]:
    """The metrics of each user before the mean (see `metrics`), for paired tests of two models over users.

    Returns
    -------
    dict
        float64 arrays (users,); `pandas.DataFrame(per_user(...))` makes a table with one row a user.

    Examples
    --------
    >>> per_user([1, 3], 5)["auc"]
    array([1. , 0.5])
    """
    rank, size = _as_array(ranks), _as_array(num_candidates)
    if rank.ndim != 1 or len(rank) == 0:
        raise ValueError(f"ranks must be a list of at least one rank; its shape is {rank.shape}.")
    if size.ndim and size.shape != rank.shape:
        raise ValueError(f"num_candidates {size.shape} must be one number or one for each of the {len(rank)} ranks.")
    size = np.broadcast_to(size, rank.shape)
    if not (size >= 2).all():
        raise ValueError(f"num_candidates is {size.min():g}; it counts the target, so it must be 2 or more.")
    for user in np.flatnonzero(~((rank >= 1) & (rank <= size)))[:1]:
        raise ValueError(f"Rank {rank[user]:g} (user {user}) is outside 1..{size[user]:g}, its number of candidates.")
    found: dict[str, np.ndarray] = {}
    for k in CUTOFFS:
        hit = (rank <= k).astype(np.float64)
        found[f"hr@{k}"] = hit
        found[f"ndcg@{k}"] = hit / np.log2(rank + 1)
    return {**found, "mrr": 1 / rank, "auc": (size - rank) / (size - 1)}


def expected(
    ranks: Sequence[float] | np.ndarray | Tensor,
    num_candidates: int | Sequence[int] | np.ndarray | Tensor,
    negatives: int,
) -> dict[str, float]:
    """The metrics of a sampled protocol in the mean over all draws of its candidates, without drawing any.

    Of a target that G of N other candidates beat, the number H of those that beat it among n drawn without
    replacement is hypergeometric, so that its rank is 1 + H and

        E[hr@k] = P(H < k)
        E[ndcg@k] = sum over h < k of P(H = h) / log2(h + 2)
        E[1 / rank] = (N + 1) / ((G + 1) (n + 1)) P(H' > 0),  H' of G + 1 among N + 1, n + 1 drawn
        E[auc] = 1 - G / N, the AUC among all

    What one draw, kept for all runs, differs from this mean is no property of a model, and averages out over users
    only, not over seeds. A rank that ends in one half (ties) counts as the mean of the two whole ranks beside it,
    which is exact for two items that tie.

    Parameters
    ----------
    ranks, num_candidates
        Ranks among all candidates (`full`), as in `metrics`; each number of candidates above `negatives`.
    negatives
        Number n of other items that the sampled protocol draws.

    Returns
    -------
    dict
        As of `metrics`.

    Raises
    ------
    ValueError
        As in `metrics`, and if a target has fewer other candidates than are to be drawn.

    Examples
    --------
    A target beaten by one of two others: drawn alone, that one comes up half of the time.

    >>> found = expected([2], 3, negatives=1)
    >>> {name: found[name] for name in ("hr@1", "mrr", "auc")}
    {'hr@1': 0.5, 'mrr': 0.75, 'auc': 0.5}
    """
    of_all = per_user(ranks, num_candidates)  # checks them
    rank = _as_array(ranks)
    others = np.broadcast_to(_as_array(num_candidates), rank.shape).astype(np.int64) - 1
    if negatives < 1 or others.min() < negatives:
        raise ValueError(f"negatives={negatives}; a target has only {others.min()} other candidates to draw from.")
    drawn = np.arange(min(max(CUTOFFS), negatives + 1))
    sums = []
    for better in (np.floor(rank - 1).astype(np.int64), np.ceil(rank - 1).astype(np.int64)):
        chance = _hypergeometric(drawn, others[:, None], better[:, None], negatives).mean(axis=0)
        shown = 1 - _hypergeometric(0, others + 1, better + 1, negatives + 1)
        values = {}
        for k in CUTOFFS:
            values[f"hr@{k}"] = chance[:k].sum()
            values[f"ndcg@{k}"] = (chance[:k] / np.log2(drawn[:k] + 2)).sum()
        values["mrr"] = ((others + 1) / ((better + 1) * (negatives + 1)) * shown).mean()
        sums.append(values)
    middle = {name: float(low + sums[1][name]) / 2 for name, low in sums[0].items()}
    return {**middle, "auc": float(of_all["auc"].mean())}


def _hypergeometric(hits: np.ndarray | int, total: np.ndarray, marked: np.ndarray, drawn: int) -> np.ndarray:
    """Chance of so many marked ones among those drawn; `scipy.stats.hypergeom.pmf` takes a hundred times as long.

    By logarithms of factorials, so with errors of some 1e-10 of the value where totals are in the ten thousands.
    """
    missed, unmarked = drawn - hits, total - marked
    possible = (hits <= marked) & (missed <= unmarked)
    logarithm = _log_choose(marked, hits) + _log_choose(unmarked, missed) - _log_choose(total, drawn)
    chance: np.ndarray = np.where(possible, np.exp(np.where(possible, logarithm, 0.0)), 0.0)
    return chance


def _log_choose(total: np.ndarray, chosen: np.ndarray | int) -> np.ndarray:
    rest = np.maximum(total - chosen, 0)  # an impossible choice is masked by the caller
    logarithm: np.ndarray = gammaln(total + 1.0) - gammaln(np.asarray(chosen) + 1.0) - gammaln(rest + 1.0)
    return logarithm


def _as_array(values: int | Sequence[float] | np.ndarray | Tensor) -> np.ndarray:
    plain = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(plain, dtype=np.float64)
