"""From events as read (`gcalib.data.formats`) to a `Pair`: what is dropped, in which order, and how much of it.

The steps, in this order, with the names under which `Pair.counts` reports them:

1.  `duplicate_events`: the same user, item and second as an earlier event; `repeated_events`: any other event of an
    item the user already has. The first is kept: a next-item target that was bought before is no new interest.
2.  `users_in_one_domain` (two single-domain files): users found in only one of them, who are dropped unless asked for
    (`min_per_domain=0`).
3.  `items_in_both_domains` (two files), with `events_of_items_in_both_domains`: such an item would carry the answer
    across; the published pairs deleted them too.
4.  `tied_events`: events that share their time with a neighbour. `ties="shuffle"` puts them in random order.
5.  `events_beyond_max_length` (`max_length`): all but a user's newest events (per-domain order: those of each domain).
6.  `users_below_minimum` (`min_per_domain`): users with too few events left in a domain, or fewer than 4 in all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from gcalib.data.pair import MIN_EVENTS, DataError, Pair, Titles, places_from_end

TIE_SEED = 0
ONE_DOMAIN_SEED = 2410_13588  # of the sample of users active in one domain, part of the data: CDSRNP's number


@dataclass(frozen=True)
class Options:
    """How events become a pair: keyword arguments of `load_pair`, explained there."""

    ties: str = "shuffle"
    max_length: int = 50
    min_per_domain: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that would give no usable pair."""
        if self.ties not in ("shuffle", "published"):
            raise ValueError(f"ties={self.ties!r} is unknown; it may be shuffle or published.")
        for name, least in (("max_length", MIN_EVENTS), ("min_per_domain", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value!r} must be {least} or more.")


@dataclass(frozen=True, eq=False)
class Events:
    """Events of both domains with users and items numbered: a prepared file as it stands, or what `match` made."""

    table: pd.DataFrame  # int64 columns `user` (ascending), `item` (from 1, domain A first) and `time`
    item_names: np.ndarray  # str (nA + nB,), raw id of item 1, 2, ...
    num_items: tuple[int, int]
    has_global_order: bool  # whether the times order each user's events across both domains
    matched: bool = False  # steps 1 to 3 are done, and items without events are still to be taken out
    counts: dict[str, int] = field(default_factory=dict)  # what was dropped so far


def match(a: pd.DataFrame, b: pd.DataFrame, one_domain: int | None = 0) -> Events:
    """Steps 1 to 3 for the events of two domains, with raw ids.

    Users, and the items of each domain, are numbered in the order of their raw ids. With all times known the two
    streams of a user are merged by time (ties: domain A first, then file order), as in the published cuts;
    otherwise each user holds all of A, then all of B.

    Of the users found in one domain only, `one_domain` are let in at random, or all (None).
    """
    table = pd.concat([a, b], ignore_index=True)
    table["user"], _ = pd.factorize(table["user"], sort=True)
    item, item_names = pd.factorize(table["item"], sort=True)
    names = np.asarray(item_names, dtype=object)
    size = len(names)  # a name of both domains is two items, until it is dropped
    table["item"] = 1 + item + np.repeat([0, size], [len(a), len(b)])
    table, counts = clean(table)
    of_a, of_b = table[table["item"] <= size], table[table["item"] > size]
    shared = np.intersect1d(of_a["item"], of_b["item"] - size)
    others = let_in = np.setxor1d(of_a["user"], of_b["user"])
    if one_domain is not None and one_domain < len(others):
        let_in = np.random.default_rng(ONE_DOMAIN_SEED).choice(others, one_domain, replace=False)
    dropped = np.setdiff1d(others, let_in)
    table = table[~table["user"].isin(dropped)]
    is_shared = table["item"].isin([*shared, *(shared + size)])
    table = table[~is_shared]
    counts |= {
        "users_in_one_domain": len(dropped),
        "items_in_both_domains": len(shared),
        "events_of_items_in_both_domains": int(is_shared.sum()),
    }
    has_global_order = bool((table["time"] >= 0).all())
    order = np.lexsort((table["time"] if has_global_order else table["item"] > size, table["user"]))
    return Events(table.iloc[order], np.concatenate([names, names]), (size, size), has_global_order, True, counts)


def clean(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """Step 1, and what it dropped."""
    repeated = table.duplicated(["user", "item"])
    duplicates = int((table.duplicated() & (table["time"] >= 0)).sum())
    return table[~repeated], {"duplicate_events": duplicates, "repeated_events": int(repeated.sum()) - duplicates}


def finish(events: Events, name: str, domains: tuple[str, str], options: Options, titles: Titles | None = None) -> Pair:
    """Steps 4 to 6 (and 1 for a prepared file, which keeps its item ids)."""
    size_a, counts, table = events.num_items[0], dict(events.counts), events.table
    if not events.matched:
        table, counts = clean(table)
    user, item, time = (table[column].to_numpy() for column in ("user", "item", "time"))
    stream = user if events.has_global_order else user * 2 + (item > size_a)
    # ties are neighbours in a stream with one known time
    tie = np.cumsum((np.diff(stream, prepend=-1) != 0) | (np.diff(time, prepend=-1) != 0) | (time < 0)) - 1
    counts["tied_events"] = int((np.bincount(tie)[tie] > 1).sum())
    if options.ties == "shuffle":
        item = item[np.lexsort((np.random.default_rng(TIE_SEED).random(len(tie)), tie))]
    newest = places_from_end(stream)[0] <= options.max_length
    counts["events_beyond_max_length"] = int((~newest).sum())
    user, item, time = user[newest], item[newest], time[newest]
    least = options.min_per_domain
    if least is None:
        least = 1 if events.has_global_order and not events.matched else 3
    size = np.bincount(user * 2 + (item > size_a), minlength=2 * user.max(initial=0) + 2).reshape(-1, 2)
    enough = (size.min(axis=1) >= least) & (size.sum(axis=1) >= MIN_EVENTS)
    counts["users_below_minimum"] = int((~enough & (size.sum(axis=1) > 0)).sum())
    kept = enough[user]
    user, item, time = user[kept], item[kept], time[kept]
    if not (left := size[enough].sum(axis=0)).all():
        dropped = ", ".join(f"{key} {number}" for key, number in counts.items() if number) or "nothing was dropped"
        needs = f"users need {least} events in each domain, {MIN_EVENTS} in all ({dropped})"
        raise DataError(f"{name}: no event of {domains[left.argmin()]} is left; {needs}. Lower min_per_domain?")
    names, num_items = events.item_names, events.num_items
    if events.matched:
        used, item = np.unique(item, return_inverse=True)
        item, names = 1 + item, names[used - 1]
        num_items = int((used <= size_a).sum()), int((used > size_a).sum())
    offsets = np.cumsum([0, *np.unique(user, return_counts=True)[1]])
    return Pair(name, domains, item, time, offsets, num_items, events.has_global_order, counts, names, titles)
