"""A pair of domains: the events of every user as flat arrays, and the leave-one-out splits drawn from them.

Nothing here reads files: `gcalib.data.sources` builds a `Pair` from published data or a path, `gcalib.data.synthetic`
from a generator.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

SplitName = Literal["val", "test"]
# Where the target stands, counted from the end of a user's sequence.
TARGET = {"val": 2, "test": 1}
# Two events to learn from (one to predict from, one to predict), one to validate on, one to test on.
MIN_EVENTS = 4
# Sampled candidates belong to the protocol, not to a run: their seed is fixed. It is the number of the paper.
CANDIDATE_SEED = 2510_09435
CANDIDATE_CHUNK = 1024


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that says what is wrong, where, and what would be right."""


@dataclass(frozen=True, eq=False)
class Split:
    """Leave-one-out targets of a pair and the histories they are to be predicted from.

    Attributes
    ----------
    name
        "val" (target: last event but one) or "test" (target: last event).
    items
        int64 (events,), the pair's own array: histories are views of it, nothing is copied.
    starts, stops
        int64 (users,): the history of user u is `items[starts[u]:stops[u]]`, all events before the target.
    targets
        int64 (users,), the item that follows the history.
    """

    name: SplitName
    items: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def users(self) -> np.ndarray:
        """int64 (users,), the user each target belongs to."""
        return np.arange(len(self.targets))

    @property
    def lengths(self) -> np.ndarray:
        """int64 (users,), events in each history."""
        return self.stops - self.starts

    def history(self, user: int) -> np.ndarray:
        """int64 (length,), a view of the events before the target of `user`, oldest first."""
        return self.items[self.starts[user] : self.stops[user]]


@dataclass(frozen=True)
class Titles:
    """Texts of items, by original id, that came with a pair.

    Attributes
    ----------
    source
        What they are, as records name it.
    from_file
        Whether they were read from a file beside the data; else they follow from what the events follow from.
    """

    by_name: dict[str, str]
    source: str = "titles"
    from_file: bool = False


@dataclass(frozen=True, eq=False)
class Pair:
    """Interaction sequences of users active in two domains.

    Item ids are 1..nA in domain A and nA + 1..nA + nB in domain B; 0 is free for padding.

    Attributes
    ----------
    name
        What the pair was loaded as.
    domains
        Names of domain A and domain B.
    items
        int64 (events,), the events of all users one user after the other, in the order the model sees.
    times
        int64 (events,), unix seconds, -1 where unknown.
    offsets
        int64 (users + 1,): the events of user u are `offsets[u]:offsets[u + 1]`.
    num_items
        Items of domain A and of domain B.
    has_clock
        False: each user's events are all of A, then all of B, and the order across domains is unknown.
    ties
        "shuffle" or "published", the order of events of one user with equal times.
    counts
        What reading dropped or changed; the names are explained in `gcalib.data.prepare`.
    item_names
        str (nA + nB,), the original id (ASIN) of item 1, 2, ..., or None if unknown.
    titles
        What the items say, if that came with the pair; for published pairs see `gcalib.data.text`.

    Raises
    ------
    DataError
        If the arrays do not fit each other, or a domain is empty.
    """

    name: str
    domains: tuple[str, str]
    items: np.ndarray
    times: np.ndarray
    offsets: np.ndarray
    num_items: tuple[int, int]
    has_clock: bool
    ties: str
    counts: dict[str, int] = field(default_factory=dict)
    item_names: np.ndarray | None = None
    titles: Titles | None = None
    _candidates: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit each other: every later computation relies on them."""
        total = sum(self.num_items)
        for domain, size in zip(self.domains, self.num_items, strict=True):
            if size < 1:
                raise DataError(f"{self.name}: domain {domain} is empty; each of the two domains needs items.")
        if len(self.offsets) < 2 or self.offsets[0] != 0 or self.offsets[-1] != len(self.items):
            raise DataError(f"{self.name}: the pair has no users, or offsets do not span its {len(self.items)} events.")
        if len(self.times) != len(self.items):
            raise DataError(f"{self.name}: {len(self.times)} times for {len(self.items)} events; each needs one.")
        if (short := self.lengths < MIN_EVENTS).any():
            user = int(short.argmax())
            raise DataError(
                f"{self.name}: user {user} has {self.lengths[user]} events; leave-one-out needs {MIN_EVENTS} or more."
            )
        if self.items.min() < 1 or self.items.max() > total:
            raise DataError(f"{self.name}: item ids must lie in 1..{total}.")
        if self.item_names is not None and len(self.item_names) != total:
            raise DataError(f"{self.name}: {len(self.item_names)} item names for {total} items.")

    @property
    def num_users(self) -> int:
        """Users, all of them active in both domains."""
        return len(self.offsets) - 1

    @cached_property
    def num_interactions(self) -> tuple[int, int]:
        """Events in domain A and in domain B."""
        in_a = int(np.count_nonzero(self.items <= self.num_items[0]))
        return in_a, len(self.items) - in_a

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 (users,), events of each user."""
        return np.diff(self.offsets)

    @cached_property
    def sha256(self) -> str:
        """Hash of all that results depend on: events, times, order, catalogue sizes, clock, titles read from a file.

        Not of names or paths.
        """
        digest = hashlib.sha256()
        for array in (self.items, self.times, self.offsets, np.array([*self.num_items, self.has_clock])):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        if self.titles is not None and self.titles.from_file:
            digest.update(json.dumps(sorted(self.titles.by_name.items())).encode())
        return digest.hexdigest()

    def sequence(self, user: int) -> np.ndarray:
        """int64 (length,), a view of the item ids of `user`: in time order, or all of A then all of B without a clock.

        Raises
        ------
        IndexError
            For a user outside 0..num_users - 1.
        """
        if not 0 <= user < self.num_users:
            raise IndexError(f"{self.name} has users 0..{self.num_users - 1}, not {user}.")
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def domain_of(self, items: np.ndarray) -> np.ndarray:
        """int8, shaped like `items`: 0 for domain A, 1 for domain B, -1 for padding (id 0)."""
        items = np.asarray(items)
        return (items > self.num_items[0]).astype(np.int8) - (items == 0).astype(np.int8)

    def require_clock(self, who: str) -> None:
        """Refuse to go on where the order of events across the two domains is unknown.

        Raises
        ------
        DataError
            If the pair has no common clock; `who` opens the sentence.
        """
        if not self.has_clock:
            raise DataError(
                f"{who} needs one stream of both domains in time order, but {self.name} is a per-domain pair: events "
                f"are ordered inside {self.domains[0]} and inside {self.domains[1]} only, so a time-ordered pair "
                "(such as food-kitchen or electronic-phone-ts) is needed."
            )

    def split(self, name: SplitName) -> Split:
        """Leave-one-out split: the last event of each user is the test target, the last but one the validation target.

        The histories of "val" are also all that training may see. Every user of a pair has 4 events or more.

        Raises
        ------
        ValueError
            For another name, or (as `DataError`) for a pair without a common clock, in which no event is the last.
        """
        if name not in TARGET:
            raise ValueError(f"There is no split {name!r}; there are val and test.")
        self.require_clock(f"The {name} split")
        stops = self.offsets[1:] - TARGET[name]
        return Split(name, self.items, self.offsets[:-1], stops, self.items[stops])

    def unseen_targets(self, name: SplitName) -> np.ndarray:
        """Bool (users,), True where the target occurs in no user's training history (`split("val")`).

        Such an item can only be ranked by chance or by its text; 18 to 50% of the items of the real pairs occur once.
        """
        train = self.split("val")
        seen = np.zeros(1 + sum(self.num_items), dtype=bool)
        ends = np.cumsum(train.lengths)
        seen[self.items[np.arange(ends[-1]) + np.repeat(train.starts - ends + train.lengths, train.lengths)]] = True
        return ~seen[self.split(name).targets]

    def candidates(self, name: SplitName, k: int) -> np.ndarray:
        """Sampled negatives of each user's target, drawn once and kept with the pair.

        Uniform without replacement among the items of the target's domain that occur nowhere in the user's
        sequence. The generator is seeded by a constant and the split, so every model and run meets the same ones.

        Parameters
        ----------
        name
            "val" or "test".
        k
            Negatives a user; with the target this makes k + 1 candidates (protocol s999 is k = 999).

        Returns
        -------
        np.ndarray
            int64 (users, k). Their order carries no meaning.

        Raises
        ------
        DataError
            If a user has fewer than k unseen items in the domain of the target.
        """
        if (name, k) not in self._candidates:
            self._candidates[name, k] = _draw_candidates(self, self.split(name), k)
        return self._candidates[name, k]


def _draw_candidates(pair: Pair, split: Split, k: int) -> np.ndarray:
    """Floyd's algorithm for sampling without replacement (Bentley & Floyd, CACM 1987), for many users at once.

    Each user samples k of the numbers 0..free - 1, which stand for the unseen items of the domain in ascending order.
    """
    if k < 1:
        raise ValueError(f"candidates need k of 1 or more, got {k}.")
    rng = np.random.default_rng([CANDIDATE_SEED, TARGET[split.name]])
    domain = pair.domain_of(split.targets)
    first = np.where(domain == 0, 1, 1 + pair.num_items[0])
    size = np.asarray(pair.num_items)[domain]
    owner = np.repeat(np.arange(pair.num_users), pair.lengths)
    inside = pair.domain_of(pair.items) == domain[owner]
    # Every user's items in the domain of the target, counted from 0, ascending; a repeated item counts once.
    keys = np.unique(owner[inside] * (1 + sum(pair.num_items)) + (pair.items - first[owner])[inside])
    seen_owner, seen = np.divmod(keys, 1 + sum(pair.num_items))
    bounds = np.searchsorted(seen_owner, np.arange(pair.num_users + 1))
    free = size - np.diff(bounds)
    if (free < k).any():
        user = int((free < k).argmax())
        raise DataError(
            f"{k} sampled candidates asked of {pair.name}, but user {user} has only {free[user]} unseen items in "
            f"domain {pair.domains[domain[user]]}: use fewer candidates or the full ranking."
        )
    drawn = np.empty((pair.num_users, k), dtype=np.int64)
    for start in range(0, pair.num_users, CANDIDATE_CHUNK):
        rows = slice(start, start + CANDIDATE_CHUNK)
        drawn[rows] = _floyd(rng, free[rows], k)
    for user in range(pair.num_users):
        # The r-th unseen item is r + the number of seen items below it.
        gaps = seen[bounds[user] : bounds[user + 1]] - np.arange(bounds[user + 1] - bounds[user])
        drawn[user] += np.searchsorted(gaps, drawn[user], side="right")
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
