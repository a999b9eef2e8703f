"""A pair of domains: the events of every user as flat arrays, and the leave-one-out splits drawn from them.

Nothing here reads files: `gcalib.data.sources` builds a `Pair` from published data or a path, `gcalib.data.synthetic`
from a generator.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from gcalib.data.candidates import draw_candidates
from gcalib.data.errors import DataError
from gcalib.data.split import MIN_EVENTS, TARGET, Split, SplitName, leave_one_out, streams

__all__ = ["MIN_EVENTS", "DataError", "Pair", "Split", "SplitName"]


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
    """Interaction sequences of users active in two domains, or (where the source has them) in one of the two.

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
    _splits: dict[SplitName, Split] = field(default_factory=dict, init=False, repr=False)
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
        if not self.has_clock and (np.diff(streams(self.items, self.offsets, self.num_items[0], False)) < 0).any():
            raise DataError(f"{self.name}: without a common clock each user's events must be all of A, then all of B.")
        if self.item_names is not None and len(self.item_names) != total:
            raise DataError(f"{self.name}: {len(self.item_names)} item names for {total} items.")

    @property
    def num_users(self) -> int:
        """Users; `in_both` tells which are active in both domains."""
        return len(self.offsets) - 1

    @cached_property
    def in_both(self) -> np.ndarray:
        """Bool (users,), True for users with events in both domains."""
        stream = streams(self.items, self.offsets, self.num_items[0], has_clock=False)
        active = np.bincount(stream, minlength=2 * self.num_users) > 0
        return active[::2] & active[1::2]

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
        """Leave-one-out: the last event of each user is the test target, the last but one the validation target.

        Without a common clock that holds for each domain of a user (`gcalib.data.split`). The histories of "val" are
        also all that training may see. Every user of a pair has 4 events or more.

        Raises
        ------
        ValueError
            For another name.
        """
        if name not in TARGET:
            raise ValueError(f"There is no split {name!r}; there are val and test.")
        if name not in self._splits:
            self._splits[name] = leave_one_out(name, self.items, self.offsets, self.num_items[0], self.has_clock)
        return self._splits[name]

    def unseen_targets(self, name: SplitName) -> np.ndarray:
        """Bool (examples,), True where the target occurs in no user's training history (`split("val")`).

        Such an item can only be ranked by chance or by its text; 18 to 50% of the items of the real pairs occur once.
        """
        seen = np.zeros(1 + sum(self.num_items), dtype=bool)
        seen[self.split("val").history_items] = True
        return ~seen[self.split(name).targets]

    def candidates(self, name: SplitName, k: int) -> np.ndarray:
        """Sampled negatives of each example's target, drawn once and kept with the pair.

        Uniform without replacement among the items of the target's domain that occur nowhere in the user's
        sequence. The generator is seeded by a constant and the split, so every model and run meets the same ones.

        Parameters
        ----------
        name
            "val" or "test".
        k
            Negatives a target; with the target this makes k + 1 candidates (protocol s999 is k = 999).

        Returns
        -------
        np.ndarray
            int64 (examples, k). Their order carries no meaning.

        Raises
        ------
        DataError
            If a user has fewer than k unseen items in the domain of the target.
        """
        if (name, k) not in self._candidates:
            self._candidates[name, k] = draw_candidates(self, self.split(name), k)
        return self._candidates[name, k]
