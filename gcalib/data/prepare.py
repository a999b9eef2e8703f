"""From events as read to a `Pair`: what is dropped, in which order, and how much of it.

The steps, in this order, with the names under which `Pair.counts` reports them:

1.  `duplicate_events`: the same user, item and second as an earlier event; `repeated_events`: any other event of an
    item the user already has. The first is kept: a next-item target that was bought before is no new interest.
2.  `events_below_k_core` (`k_core`): within each domain, users and items with fewer than k events are dropped
    until none is left. Applied to all users of a single-domain file, before users are matched.
3.  `users_in_one_domain` (two single-domain or ratings files): users found in only one of them, who are dropped
    unless asked for (`min_per_domain=0`).
4.  `items_in_both_domains` (two files), with `events_of_items_in_both_domains`: an item listed in both domains would
    carry the answer across; the published pairs deleted such items. In a prepared file it is an error.
5.  `tied_events`: events that share their time with a neighbour. `ties="shuffle"` puts them in random order.
6.  `events_beyond_max_length` (`max_length`): all but the newest events of a user; without a common clock the
    newest of each domain.
7.  `users_below_minimum` (`min_per_domain`): users with too few events left in a domain, or fewer than
    4 in all (leave-one-out: two to learn from, one to validate, one to test).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from gcalib.data.pair import MIN_EVENTS, DataError, Pair, Titles

TIES = ("shuffle", "published")
ONE_DOMAIN_SEED = 2410_13588  # of the sample of users active in one domain, part of the data: CDSRNP's number


@dataclass(frozen=True, eq=False)
class Options:
    """How events become a pair: the keyword arguments of `load_pair`.

    `min_per_domain=None` is 3, as in the published cuts, for raw files and for pairs without a common clock, where
    each domain has its own leave-one-out; a prepared file with a clock keeps its own minimum (1). With 0, users
    active in one domain only are let in.
    """

    ties: str = "shuffle"
    tie_seed: int = 0
    max_length: int = 50
    k_core: int = 1
    min_per_domain: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that would give no usable pair."""
        if self.ties not in TIES:
            raise ValueError(f"ties={self.ties!r} is unknown; it may be {' or '.join(TIES)}.")
        for name, least in (("tie_seed", 0), ("max_length", MIN_EVENTS), ("k_core", 1), ("min_per_domain", 0)):
            value = getattr(self, name)
            if value is None and name == "min_per_domain":
                continue
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of {least} or more.")


@dataclass(frozen=True, eq=False)
class Events:
    """Events of a pair before preparation, or of one domain before it is matched with another.

    Attributes
    ----------
    owner, items, times
        int64 (events,): user number (ascending), item id from 1, unix seconds or -1; the events of a user in order.
    users
        str (users,), raw ids.
    item_names
        str (items,), raw id of item 1, 2, ...
    """

    owner: np.ndarray
    items: np.ndarray
    times: np.ndarray
    users: np.ndarray
    item_names: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)

    def keep(self, which: np.ndarray, **dropped: int | np.integer) -> Events:
        """The events under a mask or in a new order; `dropped` adds to the counts. Users and items keep their ids."""
        counts = dict(self.counts)
        for name, number in dropped.items():
            counts[name] = counts.get(name, 0) + int(number)
        return replace(self, owner=self.owner[which], items=self.items[which], times=self.times[which], counts=counts)


def drop_repeats(events: Events) -> Events:
    """Step 1: keep the first event of each user and item."""
    key = events.owner * (1 + len(events.item_names)) + events.items
    by_key = np.lexsort((np.arange(len(key)), key))  # the order within a user is part of the sort
    same = np.flatnonzero(key[by_key][1:] == key[by_key][:-1])
    before, after = by_key[same], by_key[same + 1]
    duplicates = np.count_nonzero((events.times[before] == events.times[after]) & (events.times[after] >= 0))
    mask = np.ones(len(key), dtype=bool)
    mask[after] = False
    return events.keep(mask, duplicate_events=duplicates, repeated_events=len(after) - duplicates)


def drop_below_k_core(events: Events, k: int, num_items_a: int) -> Events:
    """Step 2: the largest subset in which every user of a domain and every item has k events or more.

    Items up to `num_items_a` are domain A; a user's events in A and in B are counted apart.
    """
    rows = np.arange(len(events.items))
    holder = events.owner * 2 + (events.items > num_items_a)
    while k > 1 and len(rows):
        rich = np.bincount(holder[rows])[holder[rows]] >= k
        rich &= np.bincount(events.items[rows])[events.items[rows]] >= k
        if rich.all():
            break
        rows = rows[rich]
    mask = np.zeros(len(events.items), dtype=bool)
    mask[rows] = True
    return events.keep(mask, events_below_k_core=len(mask) - len(rows))


def match(a: Events, b: Events, k_core: int, one_domain: int | None = 0) -> tuple[Events, tuple[int, int], bool]:
    """Steps 1 to 4 for two single-domain files: one table of the users and items of both.

    Users are numbered in the order of their raw ids, items of A before items of B. With all times known the two
    streams of a user are merged by time (ties: domain A first, then file order), as in the published cuts;
    otherwise each user holds all of A, then all of B.

    Parameters
    ----------
    one_domain
        Users found in one file only to let in beside those found in both: that many at random, or all (None).

    Returns
    -------
    tuple
        The events, the catalogue sizes before unused items are dropped, and whether there is a common clock.
    """
    parts = [drop_below_k_core(drop_repeats(part), k_core, len(part.item_names)) for part in (a, b)]
    present = [part.users[np.unique(part.owner)] for part in parts]
    users = np.intersect1d(*present)
    others = np.setxor1d(*present)
    if one_domain is not None and one_domain < len(others):
        others = np.random.default_rng(ONE_DOMAIN_SEED).choice(others, one_domain, replace=False)
    users = np.union1d(users, others)
    counts = {name: parts[0].counts.get(name, 0) + parts[1].counts.get(name, 0) for name in parts[0].counts}
    counts["users_in_one_domain"] = len(np.union1d(*present)) - len(users)
    # An item is shared if it is listed in both files, whoever bought it there.
    shared = np.intersect1d(*(part.item_names[np.unique(part.items) - 1] for part in parts))
    counts |= {"items_in_both_domains": len(shared), "events_of_items_in_both_domains": 0}
    matched = []
    for part in parts:
        number = np.searchsorted(users, part.users)
        known = np.zeros(len(part.users), dtype=bool)
        known[number < len(users)] = users[number[number < len(users)]] == part.users[number < len(users)]
        kept = part.keep(known[part.owner])
        is_shared = pd.Index(part.item_names).isin(shared)[kept.items - 1]
        counts["events_of_items_in_both_domains"] += int(np.count_nonzero(is_shared))
        matched.append(replace(kept, owner=number[kept.owner]).keep(~is_shared))
    sizes = len(a.item_names), len(b.item_names)
    owner = np.concatenate([part.owner for part in matched])
    items = np.concatenate([matched[0].items, matched[1].items + sizes[0]])
    times = np.concatenate([part.times for part in matched])
    has_clock = bool((times >= 0).all())
    order = np.lexsort((times, owner)) if has_clock else np.argsort(owner, kind="stable")
    names = np.concatenate([a.item_names, b.item_names])
    return Events(owner[order], items[order], times[order], users, names, counts), sizes, has_clock


def finish(
    events: Events,
    *,
    name: str,
    domains: tuple[str, str],
    num_items: tuple[int, int],
    has_clock: bool,
    options: Options,
    raw: bool,
    titles: Titles | None = None,
) -> Pair:
    """Steps 5 to 7 (and 1, 2 for a prepared file), then the `Pair`.

    `raw` drops items without events and renumbers the rest in the order of their raw ids; a prepared file keeps
    its item ids unless `k_core` takes items out.
    """
    if not raw:
        events = drop_below_k_core(drop_repeats(events), options.k_core, num_items[0])
    tie = _tie_groups(events, num_items, has_clock)
    in_tie = np.bincount(tie)[tie] > 1 if len(tie) else np.zeros(0, dtype=bool)
    order = np.arange(len(tie))
    if options.ties == "shuffle":
        order = np.lexsort((np.random.default_rng(options.tie_seed).random(len(tie)), tie))
    events = events.keep(order, tied_events=np.count_nonzero(in_tie))
    # Newest events: counted from the end of the user's stream, or of each domain's stream.
    stream = events.owner if has_clock else events.owner * 2 + _domain(events, num_items)
    stops = np.cumsum(np.bincount(stream)) if len(stream) else np.zeros(0, dtype=np.int64)
    newest = stops[stream] - np.arange(len(stream)) <= options.max_length
    events = events.keep(newest, events_beyond_max_length=np.count_nonzero(~newest))
    least = options.min_per_domain
    if least is None:
        least = 3 if raw or not has_clock else 1
    domain = _domain(events, num_items)
    size = np.bincount(events.owner * 2 + domain, minlength=2 * len(events.users)).reshape(-1, 2)
    enough = (size.min(axis=1) >= least) & (size.sum(axis=1) >= MIN_EVENTS)
    # A user without any event left here was dropped by an earlier step and is counted there.
    below = np.count_nonzero(~enough & (size.sum(axis=1) > 0))
    events = events.keep(enough[events.owner], users_below_minimum=below)
    if not len(events.items):
        dropped = ", ".join(f"{key} {number}" for key, number in events.counts.items() if number) or "no events"
        raise DataError(
            f"{name}: no user is left with {least} events in each domain, {MIN_EVENTS} in all ({dropped}); give more "
            "data, or lower min_per_domain or k_core."
        )
    if raw or options.k_core > 1:
        events, num_items = _compact(events, num_items)
    lengths = np.bincount(events.owner, minlength=len(events.users))[enough]
    return Pair(
        name=name,
        domains=domains,
        items=events.items,
        times=events.times,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        num_items=num_items,
        has_clock=has_clock,
        ties=options.ties,
        counts=events.counts,
        item_names=events.item_names,
        titles=titles,
    )


def _domain(events: Events, num_items: tuple[int, int]) -> np.ndarray:
    return (events.items > num_items[0]).astype(np.int8)


def _tie_groups(events: Events, num_items: tuple[int, int], has_clock: bool) -> np.ndarray:
    """int64 (events,), ascending: equal for neighbours of one user (without a clock: and domain) at one known time."""
    stream = events.owner if has_clock else events.owner * 2 + _domain(events, num_items)
    new = (np.diff(stream, prepend=-1) != 0) | (np.diff(events.times, prepend=-1) != 0) | (events.times < 0)
    return np.cumsum(new) - 1


def _compact(events: Events, num_items: tuple[int, int]) -> tuple[Events, tuple[int, int]]:
    """Number the items that have events anew, by domain and raw id."""
    used = np.unique(events.items)
    used = used[np.lexsort((events.item_names[used - 1], used > num_items[0]))]
    number = np.zeros(1 + sum(num_items), dtype=np.int64)
    number[used] = 1 + np.arange(len(used))
    size_a = int(np.count_nonzero(used <= num_items[0]))
    compacted = replace(events, items=number[events.items], item_names=events.item_names[used - 1])
    return compacted, (size_a, len(used) - size_a)
