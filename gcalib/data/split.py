"""Leave-one-out: which events are held out, and the histories they are to be predicted from.

With a common clock each user gives one example: the last event is the test target, the last but one the validation
target, and the history is all that came before it, of both domains.

Without one (a per-domain pair) no event of a user is the last, but in each domain one is: a user gives one example for
each domain of 3 events or more. The history of an example is the user's events of A, then those of B, less what is
held out in either domain: the last event of both in "test", the last two of both in "val" and training. A domain of
fewer events is context only. Whether the other domain's events came before the target is unknown, and every result on
such a pair carries that caveat.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

SplitName = Literal["val", "test"]
# Where the target stands, counted from the end of a user's sequence (without a clock: of each domain's).
TARGET = {"val": 2, "test": 1}
# Two events to learn from (one to predict from, one to predict), one to validate on, one to test on.
MIN_EVENTS = 4
# Without a clock: events of a domain that has targets, one to predict from, one to validate on, one to test on.
MIN_IN_DOMAIN = 3


@dataclass(frozen=True, eq=False)
class Split:
    """Leave-one-out targets of a pair and the histories they are to be predicted from.

    Attributes
    ----------
    name
        "val" or "test".
    items
        int64 (events,): histories are views of it. With a common clock the pair's own array, nothing is copied;
        without one, the pair's events less those held out.
    starts, stops
        int64 (users,): the history of user u is `items[starts[u]:stops[u]]`.
    users
        int64 (examples,), the user of each example, ascending; with a common clock 0, 1, 2, ...
    targets
        int64 (examples,), the item to be predicted from the user's history.
    """

    name: SplitName
    items: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    users: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (users,), events in each history."""
        return self.stops - self.starts

    def history(self, user: int) -> np.ndarray:
        """int64 (length,), a view of what predicts the target or targets of `user`: oldest first, or A then B."""
        return self.items[self.starts[user] : self.stops[user]]

    @cached_property
    def history_items(self) -> np.ndarray:
        """int64 (events,), all histories one after the other: in "val", all that training may see."""
        ends = np.cumsum(self.lengths)
        return self.items[np.arange(ends[-1]) + np.repeat(self.starts - ends + self.lengths, self.lengths)]


def streams(items: np.ndarray, offsets: np.ndarray, num_items_a: int, has_clock: bool) -> np.ndarray:
    """int64 (events,), ascending: the sequence that leave-one-out works on, a user's or (without a clock) a domain's.

    >>> streams(np.array([1, 2, 7, 1, 8]), np.array([0, 3, 5]), 5, has_clock=False).tolist()
    [0, 0, 1, 2, 3]
    """
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return owner if has_clock else owner * 2 + (items > num_items_a)


def to_end(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each event, its place in its stream counted from the end (1 is the last), and the stream's length."""
    size = np.bincount(stream)
    return np.cumsum(size)[stream] - np.arange(len(stream)), size[stream]


def leave_one_out(name: SplitName, items: np.ndarray, offsets: np.ndarray, num_items_a: int, has_clock: bool) -> Split:
    """The split of a pair's arrays; see the module's docstring."""
    if has_clock:
        stops = offsets[1:] - TARGET[name]
        return Split(name, items, offsets[:-1], stops, np.arange(len(stops)), items[stops])
    place, size = to_end(streams(items, offsets, num_items_a, has_clock))
    held_out = (place <= TARGET[name]) & (size >= MIN_IN_DOMAIN)
    targets = np.flatnonzero(held_out & (place == TARGET[name]))
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    stops = np.cumsum(np.bincount(owner[~held_out], minlength=len(offsets) - 1))
    starts = np.concatenate([[0], stops[:-1]])
    return Split(name, items[~held_out], starts, stops, owner[targets], items[targets])
