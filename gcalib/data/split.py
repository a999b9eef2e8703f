"""Leave-one-out: which events are held out, and the histories they are to be predicted from.

With a global order each user gives one example: the last event is the test target, the last but one the validation
target, and the history is all that came before it, of both domains.

With per-domain order a user gives one example for each domain of 3 events or more; a domain of fewer is context only.
The history is the user's events of A, then those of B, less what is held out in either domain: the last event of both
in "test", the last two of both in "val" and training. Whether the other domain's events came before the target is
unknown, and every result on such a pair carries that caveat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

SplitName = Literal["val", "test"]
# Where the target stands, counted from the end of a user's sequence (per-domain order: of each domain's).
TARGET = {"val": 2, "test": 1}
# Events of a user: two to learn from (one to predict from, one to predict), one to validate on, one to test on.
MIN_EVENTS = 4
# Per-domain order: events of a domain that has targets, one to predict from, one to validate on, one to test on.
MIN_IN_DOMAIN = 3


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
