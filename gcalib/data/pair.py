"""A pair of domains: every user's events in flat arrays, its leave-one-out splits and its sampled candidates.

Leave-one-out holds out the newest events. With a global order each user gives one example: the last event is the test
target, the last but one the validation target, and the history is all that came before it, of both domains.

With per-domain order a user gives one example for each domain of 3 events or more; a domain of fewer is context only.
The history is the user's events of A, then those of B, less what is held out in either domain: the last event of both
in "test", the last two of both in "val" and training. Whether the other domain's events came before the target is
unknown, and every result on such a pair carries that caveat.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

SplitName = Literal["val", "test"]
# Where the target stands, counted from the end of a user's sequence (per-domain order: of each domain's).
TARGET = {"val": 2, "test": 1}
# Events of a user: two to learn from (one to predict from, one to predict), one to validate on, one to test on.
MIN_EVENTS = 4
# Per-domain order: events of a domain that has targets, one to predict from, one to validate on, one to test on.
MIN_IN_DOMAIN = 3

# Sampled candidates belong to the protocol, not to a run: their seed is fixed. It is the number of the paper.
CANDIDATE_SEED = 2510_09435
CANDIDATE_ROWS = 1024  # drawn at a time


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that says what is wrong, where, and what would be right."""


class NoDataError(DataError):
    """Data that is not on this machine and cannot be fetched."""


@dataclass(frozen=True)
class Titles:
    """Texts of items, by original id, that came with a pair."""

    by_name: dict[str, str]
    source: str = "titles"  # what they are, as records name it
    from_file: bool = False  # else they follow from what the events follow from
    of_b: dict[str, str] | None = None  # where an id means another item in domain B


@dataclass(frozen=True, eq=False)
class Split:
    """Leave-one-out targets of a pair and the histories they are to be predicted from."""

    name: SplitName
    history_items: np.ndarray  # int64 (events,), the histories of all users; in "val" all that training may see
    offsets: np.ndarray  # int64 (users + 1,): the history of user u is `history_items[offsets[u]:offsets[u + 1]]`
    users: np.ndarray  # int64 (examples,), the user of each example, ascending; with a global order 0, 1, 2, ...
    targets: np.ndarray  # int64 (examples,), the item to be predicted from the user's history

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (users,), events in each history."""
        return np.diff(self.offsets)

    def history(self, user: int) -> np.ndarray:
        """int64 (length,), a view of what predicts the target or targets of `user`: oldest first, or A then B."""
        return self.history_items[self.offsets[user] : self.offsets[user + 1]]


def leave_one_out(name: SplitName, items: np.ndarray, owner: np.ndarray, stream: np.ndarray) -> Split:
    """The split of events; each belongs to a user and, for what is held out, to a stream: a user's, or a domain's."""
    to_end, size = places_from_end(stream)
    held_out = (to_end <= TARGET[name]) & (size >= MIN_IN_DOMAIN)
    targets = held_out & (to_end == TARGET[name])
    offsets = np.cumsum([0, *np.bincount(owner[~held_out])])
    return Split(name, items[~held_out], offsets, owner[targets], items[targets])


def places_from_end(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each event of ascending streams, its place counted from the stream's end (1 is the last), and its length."""
    size = np.bincount(stream)
    return np.cumsum(size)[stream] - np.arange(len(stream)), size[stream]


@dataclass(frozen=True, eq=False)
class Pair:
    """Interaction sequences of users active in two domains, or (where the source has them) in one of the two.

    Item ids are 1..nA in domain A and nA + 1..nA + nB in domain B; 0 is free for padding. The events of user u are
    `offsets[u]:offsets[u + 1]` of the flat arrays, in the order that models see.
    """

    name: str  # what it was loaded as
    domains: tuple[str, str]  # names of domain A and domain B
    items: np.ndarray  # int64 (events,), the items of all users one user after the other
    times: np.ndarray  # int64 (events,), unix seconds, -1 where unknown
    offsets: np.ndarray  # int64 (users + 1,)
    num_items: tuple[int, int]  # of domain A and of domain B
    has_global_order: bool  # False: a user's events are all of A, then all of B, the order across domains is unknown
    counts: dict[str, int] = field(default_factory=dict)  # what reading dropped, as `gcalib.data.prepare` explains
    item_names: np.ndarray | None = None  # str (nA + nB,), the original id (ASIN) of item 1, 2, ..., if known
    titles: Titles | None = None  # what the items say, if that came with the pair; see also `gcalib.data.text`
    _splits: dict[SplitName, Split] = field(default_factory=dict, init=False, repr=False)
    _candidates: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_users(self) -> int:
        """Users; `in_both` tells which are active in both domains."""
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 (users,), events of each user."""
        return np.diff(self.offsets)

    @cached_property
    def owner(self) -> np.ndarray:
        """int64 (events,), the user of each event."""
        return np.repeat(np.arange(self.num_users), self.lengths)

    @cached_property
    def stream(self) -> np.ndarray:
        """int64 (events,), ascending: the sequence an event is part of, a user's or (per-domain order) a domain's."""
        return self.owner if self.has_global_order else self.owner * 2 + self.domain_of(self.items)

    @cached_property
    def in_both(self) -> np.ndarray:
        """Bool (users,), True for users with events in both domains."""
        events = np.bincount(self.owner * 2 + self.domain_of(self.items), minlength=2 * self.num_users)
        return np.all(events.reshape(-1, 2), axis=1)

    @cached_property
    def num_interactions(self) -> tuple[int, int]:
        """Events in domain A and in domain B."""
        in_a = int(np.count_nonzero(self.items <= self.num_items[0]))
        return in_a, len(self.items) - in_a

    @cached_property
    def sha256(self) -> str:
        """Hash of all that results depend on, not of names: events, times, order, sizes, titles read from a file."""
        digest = hashlib.sha256()
        for array in (self.items, self.times, self.offsets, np.array([*self.num_items, self.has_global_order])):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        if self.titles is not None and self.titles.from_file:
            digest.update(json.dumps(sorted(self.titles.by_name.items())).encode())
            digest.update(json.dumps(sorted(self.titles.of_b.items())).encode() if self.titles.of_b else b"")
        return digest.hexdigest()

    def sequence(self, user: int) -> np.ndarray:
        """int64 (length,), a view of the item ids of `user` in time order; with per-domain order all of A, then B."""
        if not 0 <= user < self.num_users:
            raise IndexError(f"{self.name} has users 0..{self.num_users - 1}, not {user}.")
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def domain_of(self, items: np.ndarray) -> np.ndarray:
        """int8, shaped like `items`: 0 for domain A, 1 for domain B, -1 for padding (id 0)."""
        items = np.asarray(items)
        return (items > self.num_items[0]).astype(np.int8) - (items == 0).astype(np.int8)

    def require_global_order(self, who: str) -> None:
        """Raise `DataError` if the order of events across the two domains is unknown; `who` opens the sentence."""
        if not self.has_global_order:
            inside = f"events are ordered inside {self.domains[0]} and inside {self.domains[1]} only"
            needed = "a time-ordered pair (such as food-kitchen or electronic-phone-ts) is needed"
            what = f"one stream of both domains in time order, but {self.name} is a per-domain pair"
            raise DataError(f"{who} needs {what}: {inside}, so {needed}.")

    def split(self, name: SplitName) -> Split:
        """Leave-one-out: the last event of each user is the test target, the last but one the validation target.

        With per-domain order that holds for each domain of a user. The histories of "val" are all that training sees.
        """
        if name not in TARGET:
            raise ValueError(f"There is no split {name!r}; there are val and test.")
        if name not in self._splits:
            self._splits[name] = leave_one_out(name, self.items, self.owner, self.stream)
        return self._splits[name]

    def unseen_targets(self, name: SplitName) -> np.ndarray:
        """Bool (examples,), True where the target occurs in no user's training history: its id tells nothing."""
        return ~np.isin(self.split(name).targets, self.split("val").history_items)

    def candidates(self, name: SplitName, k: int) -> np.ndarray:
        """Sampled negatives of each example's target, drawn once and kept with the pair.

        Uniform without replacement among the items of the target's domain that occur nowhere in the user's
        sequence. The generator is seeded by a constant and the split, so every model and run meets the same ones.

        Returns
        -------
        np.ndarray
            int64 (examples, k) in no order; with the target k + 1 candidates (protocol s999 is k = 999).

        Raises
        ------
        DataError
            If a user has fewer than k unseen items in the domain of the target.
        """
        if (name, k) not in self._candidates:
            self._candidates[name, k] = _draw_candidates(self, self.split(name), k)
        return self._candidates[name, k]


def _draw_candidates(pair: Pair, split: Split, k: int) -> np.ndarray:
    """int64 (examples, k): k of the numbers 0..free - 1, which stand for the unseen items in ascending order."""
    rng = np.random.default_rng([CANDIDATE_SEED, TARGET[split.name]])
    domain = pair.domain_of(split.targets)
    first = np.where(domain == 0, 1, 1 + pair.num_items[0])
    # Every user's items, domain by domain, ascending; a repeated item counts once.
    base = 1 + sum(pair.num_items)
    keys = np.unique((pair.owner * 2 + pair.domain_of(pair.items)) * base + pair.items)
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
    chunks = (slice(start, start + CANDIDATE_ROWS) for start in range(0, len(split), CANDIDATE_ROWS))
    drawn = np.concatenate([_sample(rng, free[rows], k) for rows in chunks])
    for example in range(len(split)):
        # The r-th unseen item is r + the number of seen items below it.
        items = seen[begin[example] : end[example]] - first[example]
        drawn[example] += np.searchsorted(items - np.arange(len(items)), drawn[example], side="right")
    return drawn + first[:, None]


def _sample(rng: np.random.Generator, free: np.ndarray, k: int) -> np.ndarray:
    """int64 (rows, k): in each row k different numbers of 0..free[row] - 1 (Floyd's algorithm, CACM 1987)."""
    rows = np.arange(len(free))
    last = free - k + np.arange(k)[:, None]  # (k, rows): step i adds one of 0..last[i], or last[i] itself
    picks = rng.integers(0, last, endpoint=True)
    taken = np.zeros((len(free), int(free.max())), dtype=bool)
    for pick, new in zip(picks, last, strict=True):
        np.copyto(pick, new, where=taken[rows, pick])
        taken[rows, pick] = True
    return picks.T
