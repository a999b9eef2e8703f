"""Scorers that learn nothing beyond counts, and their ranks: what a trained model has to beat.

A scorer is made for a pair and a domain, and then gives users a score for each item of that domain. All of them look
at the test split: they count in training histories (`pair.split("val")`) and know what precedes the test target.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse

from gcalib.data.pair import Pair
from gcalib.data.split import MIN_IN_DOMAIN, TARGET, streams, to_end
from gcalib.ranking import rank_among, rank_of_target

# int64 (users,) to float32 (users, items of the domain)
Scorer = Callable[[np.ndarray], np.ndarray]
USERS = 512  # scored at a time


def training_events(pair: Pair) -> np.ndarray:
    """Bool (events,), True for what training may see: all that leave-one-out does not hold out."""
    place, size = to_end(_streams(pair))
    held_out = place <= TARGET["val"]
    seen: np.ndarray = ~held_out if pair.has_clock else ~held_out | (size < MIN_IN_DOMAIN)
    return seen


def counts(pair: Pair) -> np.ndarray:
    """float32 (1 + nA + nB,), training events of each item."""
    return np.bincount(pair.items[training_events(pair)], minlength=1 + sum(pair.num_items)).astype(np.float32)


def transitions(pair: Pair) -> sparse.csr_array:
    """float32 (1 + nA + nB, 1 + nA + nB): how often column came right after row in a training history."""
    stream, size = _streams(pair), 1 + sum(pair.num_items)
    steps = np.flatnonzero(training_events(pair)[1:] & (stream[1:] == stream[:-1]))
    ones = np.ones(len(steps), np.float32)
    return sparse.coo_array((ones, (pair.items[steps], pair.items[steps + 1])), shape=(size, size)).tocsr()


def similarities(pair: Pair) -> sparse.csr_array:
    """float32 (1 + nA + nB, 1 + nA + nB): cosines of items' columns in the binary user-item matrix of training.

    Both domains are in it: an item of the other domain speaks too (Sarwar et al., WWW 2001).
    """
    owner, known = np.repeat(np.arange(pair.num_users), pair.lengths), training_events(pair)
    shape = pair.num_users, 1 + sum(pair.num_items)
    bought = sparse.coo_array((np.ones(known.sum(), np.float32), (owner[known], pair.items[known])), shape).tocsr()
    bought.data[:] = 1  # whatever was bought twice
    unit = bought @ sparse.diags_array(1 / np.sqrt(np.maximum(bought.sum(axis=0), 1)).astype(np.float32))
    return (unit.T @ unit).tocsr()


def popularity(pair: Pair, domain: int) -> Scorer:
    """Score an item by its number of training events: the same for every user."""
    of_domain = counts(pair)[_ids(pair, domain)]
    return lambda users: np.tile(of_domain, (len(users), 1))


def markov(pair: Pair, domain: int) -> Scorer:
    """Score an item by how often it came right after the user's last item in a training history."""
    followed, last = transitions(pair)[:, _ids(pair, domain)], _last_items(pair, domain)
    return lambda users: followed[last[users]].toarray()


def item_knn(pair: Pair, domain: int) -> Scorer:
    """Score an item by its cosine similarities to the items of the user's history, added up."""
    similar, test = similarities(pair)[:, _ids(pair, domain)], pair.split("test")

    def score(users: np.ndarray) -> np.ndarray:
        histories = [test.history(user) for user in users]
        rows = np.repeat(np.arange(len(users)), [len(history) for history in histories])
        seen = sparse.coo_array(
            (np.ones(len(rows), np.float32), (rows, np.concatenate(histories))), (len(users), similar.shape[0])
        )
        return (seen.tocsr() @ similar).toarray()

    return score


def nearest_id(pair: Pair, domain: int, side: int) -> Scorer:
    """Score an item by how near its id lies above (`side=1`) or below (`side=-1`) that of the user's last item.

    Items on the other side, and all items if the last one belongs to the other domain, score zero. Ids carry no
    preference for a side, so what one side gains over the other it owes to the order in which events were filed.
    """
    last, ids = _last_items(pair, domain), _ids(pair, domain)

    def score(users: np.ndarray) -> np.ndarray:
        gap = side * (ids - last[users][:, None])
        usable = (gap > 0) & (pair.domain_of(last[users]) == domain)[:, None]
        return np.where(usable, 1 / np.maximum(gap, 1), 0).astype(np.float32)

    return score


def ranks(pair: Pair, scorer: Scorer, domain: int, negatives: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the test targets of a domain under a scorer.

    Parameters
    ----------
    negatives
        Rank among that many sampled items (`Pair.candidates`); None ranks among all items of the domain that the user
        does not have yet.

    Returns
    -------
    ranks, num_candidates
        float64 and int64 (examples with a target in the domain,), as `gcalib.ranking.metrics` takes them.
    """
    test, first, size = pair.split("test"), 1 + domain * pair.num_items[0], pair.num_items[domain]
    examples = np.flatnonzero(pair.domain_of(test.targets) == domain)
    found, sizes = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(examples), USERS):
        part = examples[start : start + USERS]
        users = test.users[part]
        scores, target = torch.from_numpy(scorer(users)), torch.from_numpy(test.targets[part] - first)
        if negatives is None:
            row = np.repeat(np.arange(len(part)), test.lengths[users])
            items = np.concatenate([test.history(user) for user in users])
            mine = pair.domain_of(items) == domain
            of_target = np.arange(len(part)) * size + target.numpy()
            keys = np.setdiff1d(row[mine] * size + items[mine] - first, of_target)
            known = torch.from_numpy(keys // size), torch.from_numpy(keys % size)
            found.append(rank_of_target(scores, target, known).numpy())
            sizes.append(size - np.bincount(keys // size, minlength=len(part)))
        else:
            others = torch.from_numpy(pair.candidates("test", negatives)[part] - first)
            found.append(rank_among(scores.gather(1, target[:, None])[:, 0], scores.gather(1, others)).numpy())
            sizes.append(np.full(len(part), 1 + negatives))
    return np.concatenate(found), np.concatenate(sizes)


def _ids(pair: Pair, domain: int) -> np.ndarray:
    return 1 + domain * pair.num_items[0] + np.arange(pair.num_items[domain])


def _streams(pair: Pair) -> np.ndarray:
    return streams(pair.items, pair.offsets, pair.num_items[0], pair.has_clock)


def _last_items(pair: Pair, domain: int) -> np.ndarray:
    """int64 (users,), the item before each user's test target (without a clock: in the domain, 0 where none is)."""
    test = pair.split("test")
    if pair.has_clock:
        last: np.ndarray = pair.items[test.stops - 1]
        return last
    of_domain = [history[pair.domain_of(history) == domain] for history in map(test.history, range(pair.num_users))]
    return np.array([history[-1] if len(history) else 0 for history in of_domain])
