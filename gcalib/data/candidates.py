"""Sampled candidates of the protocols s999 and s100: drawn once for a pair and a split, the same for every run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gcalib.data.errors import DataError
from gcalib.data.split import TARGET, Split

if TYPE_CHECKING:
    from gcalib.data.pair import Pair

# Sampled candidates belong to the protocol, not to a run: their seed is fixed. It is the number of the paper.
CANDIDATE_SEED = 2510_09435
CANDIDATE_CHUNK = 1024


def draw_candidates(pair: Pair, split: Split, k: int) -> np.ndarray:
    """int64 (examples, k): see `Pair.candidates`.

    Floyd's algorithm for sampling without replacement (Bentley & Floyd, CACM 1987), for many examples at once. Each
    samples k of the numbers 0..free - 1, which stand for the unseen items of the domain in ascending order.
    """
    if k < 1:
        raise ValueError(f"candidates need k of 1 or more, got {k}.")
    rng = np.random.default_rng([CANDIDATE_SEED, TARGET[split.name]])
    domain = pair.domain_of(split.targets)
    first = np.where(domain == 0, 1, 1 + pair.num_items[0])
    # Every user's items, domain by domain, ascending; a repeated item counts once.
    base = 1 + sum(pair.num_items)
    owner = np.repeat(np.arange(pair.num_users), pair.lengths)
    keys = np.unique((owner * 2 + pair.domain_of(pair.items)) * base + pair.items)
    stream, seen = np.divmod(keys, base)
    asked = split.users * 2 + domain
    begin, end = (np.searchsorted(stream, asked, side=side) for side in ("left", "right"))
    free = np.asarray(pair.num_items)[domain] - (end - begin)
    if (free < k).any():
        example = int((free < k).argmax())
        raise DataError(
            f"{k} sampled candidates asked of {pair.name}, but user {split.users[example]} has only {free[example]} "
            f"unseen items in domain {pair.domains[domain[example]]}: use fewer candidates or the full ranking."
        )
    drawn = np.empty((len(split), k), dtype=np.int64)
    for start in range(0, len(split), CANDIDATE_CHUNK):
        rows = slice(start, start + CANDIDATE_CHUNK)
        drawn[rows] = _floyd(rng, free[rows], k)
    for example in range(len(split)):
        # The r-th unseen item is r + the number of seen items below it.
        items = seen[begin[example] : end[example]] - first[example]
        drawn[example] += np.searchsorted(items - np.arange(len(items)), drawn[example], side="right")
    return drawn + first[:, None]


def _floyd(rng: np.random.Generator, free: np.ndarray, k: int) -> np.ndarray:
    """int64 (rows, k): in each row k different numbers out of 0..free[row] - 1, every subset equally likely."""
    rows = np.arange(len(free))
    last = free - k + np.arange(k)[:, None]  # (k, rows): step i adds one of 0..last[i], or last[i] itself
    picks = rng.integers(0, last, endpoint=True)
    taken = np.zeros((len(free), int(free.max())), dtype=bool)
    for pick, new in zip(picks, last, strict=True):
        np.copyto(pick, new, where=taken[rows, pick])
        taken[rows, pick] = True
    return picks.T
