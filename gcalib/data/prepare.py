"""From events as read to a `Pair`: what is dropped, in which order (`STEPS`), and how much of it (`Pair.counts`)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from gcalib.data.pair import MIN_EVENTS, DataError, Pair, Titles, places_from_end

log = logging.getLogger("gcalib")

STEPS = {
    "events_without_time": "they have no time, and others of their domain have one",
    "duplicate_events": "the same user, item and time as an earlier event",
    "repeated_events": "the user has an earlier event of the item: what was bought before is no new interest",
    "users_in_one_domain": "users found in one of the two domains only; min_per_domain=0 lets them in",
    "items_in_both_domains": "items of both domains, which would carry the answer across; and their events:",
    "events_of_items_in_both_domains": "events of items in both domains",
    "events_beyond_max_length": "all but a user's newest max_length events (per-domain order: those of each domain)",
    "events_of_rare_items": "their item has fewer than min_events_per_item events",
    "users_below_minimum": f"users with fewer than min_per_domain events in a domain, or than {MIN_EVENTS} in all",
    "tied_events": "not dropped: they share their time with a neighbour; ties='shuffle' puts them in random order",
}
"""What `Pair.counts` counts, in the order of the steps; the last two drop repeatedly, until both minima hold."""

TIE_SEED = 0
ONE_DOMAIN_SEED = 2410_13588  # of the sample of users active in one domain, part of the data: CDSRNP's number


@dataclass(frozen=True)
class Options:
    """How events become a pair: keyword arguments of `load_pair`, explained there."""

    ties: str = "shuffle"
    max_length: int = 50
    min_per_domain: int | None = None
    min_events_per_item: int = 1
    shared_ids: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that would give no usable pair."""
        if self.ties not in ("shuffle", "published"):
            raise ValueError(f"ties={self.ties!r} is unknown; it may be shuffle or published.")
        if self.shared_ids not in (None, "drop", "distinct"):
            raise ValueError(f"shared_ids={self.shared_ids!r} is unknown; it may be drop or distinct.")
        for name, least in (("max_length", MIN_EVENTS), ("min_per_domain", 0), ("min_events_per_item", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r} must be a whole number, {least} or more.")


@dataclass(frozen=True, eq=False)
class Events:
    """Events of both domains with users and items numbered: a prepared file as it stands, or what `match` made."""

    table: pd.DataFrame  # int64 columns `user` (ascending), `item` (from 1, domain A first) and `time`
    item_names: np.ndarray  # str (nA + nB,), raw id of item 1, 2, ...
    num_items: tuple[int, int]
    has_global_order: bool  # whether the times order each user's events across both domains
    matched: bool = False  # by `match`: items without events are still to be taken out
    counts: dict[str, int] = field(default_factory=dict)  # what was dropped so far
    per_second: int = 1  # units of time in a second: events within one are in order too


def match(
    a: pd.DataFrame, b: pd.DataFrame, one_domain: int | None = 0, shared_ids: str | None = None, per_second: int = 1
) -> Events:
    """The steps up to `events_of_items_in_both_domains`, for the events of two domains with raw ids.

    Users, and the items of each domain, are numbered in the order of their raw ids. With times the two
    streams of a user are merged (ties: domain A first, then file order), as in the published cuts; without them in a
    domain each user holds all of A, then all of B. Of a domain with some times the events without one are dropped.

    Of the users found in one domain only, `one_domain` are let in at random, or all (None).
    """
    counts = {"events_without_time": 0}
    timed = []
    for table in (a, b):
        known = (table["time"] >= 0).to_numpy()
        dropped = int((~known).sum()) if known.any() else 0
        counts["events_without_time"] += dropped
        timed.append(table[known] if dropped else table)
    a, b = timed
    table = pd.concat([a, b], ignore_index=True)
    table["user"], _ = pd.factorize(table["user"], sort=True)
    item, item_names = pd.factorize(table["item"], sort=True)
    names = np.asarray(item_names, dtype=object)
    size = len(names)  # a name of both domains is two items, until it is dropped
    table["item"] = 1 + item + np.repeat([0, size], [len(a), len(b)])
    has_global_order = bool((table["time"] >= 0).all())
    in_order = ["user", "time"] if has_global_order else ["user"]
    table, cleaned = clean(table.sort_values(in_order, kind="stable"))
    of_a, of_b = table[table["item"] <= size], table[table["item"] > size]
    shared = np.intersect1d(of_a["item"], of_b["item"] - size)
    if shared_ids is None and len(shared) and pd.Series(names).str.fullmatch("[0-9]+").all():
        what = f"{len(shared)} item ids, such as {names[shared[0] - 1]}, are in both domains, and all ids are numbers"
        meant = "shared_ids='distinct' if each domain has numbers of its own, shared_ids='drop' if they are one item"
        raise DataError(f"{what}: state {meant}, which is then left out.")
    if shared_ids == "distinct":
        shared = shared[:0]
    others = let_in = np.setxor1d(of_a["user"], of_b["user"])
    if one_domain is not None and one_domain < len(others):
        let_in = np.random.default_rng(ONE_DOMAIN_SEED).choice(others, one_domain, replace=False)
    dropped_users = np.setdiff1d(others, let_in)
    table = table[~table["user"].isin(dropped_users)]
    is_shared = table["item"].isin([*shared, *(shared + size)])
    table = table[~is_shared]
    counts |= cleaned | {
        "users_in_one_domain": len(dropped_users),
        "items_in_both_domains": len(shared),
        "events_of_items_in_both_domains": int(is_shared.sum()),
    }
    if not has_global_order:
        table = table.iloc[np.lexsort((table["item"] > size, table["user"]))]
        return Events(table, np.concatenate([names, names]), (size, size), False, True, counts, per_second)
    ends = table.groupby(table["item"] > size)["time"].agg(["min", "max"])
    if len(ends) == 2 and ends["max"].min() < ends["min"].max():
        log.warning("All events of one domain are earlier than all of the other: are their times in one unit?")
    return Events(table, np.concatenate([names, names]), (size, size), True, True, counts, per_second)


def clean(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """Without the later ones of a user's events of an item, and how many these were."""
    repeated = table.duplicated(["user", "item"])
    duplicates = int((table.duplicated() & (table["time"] >= 0)).sum())
    return table[~repeated], {"duplicate_events": duplicates, "repeated_events": int(repeated.sum()) - duplicates}


def finish(events: Events, name: str, domains: tuple[str, str], options: Options, titles: Titles | None = None) -> Pair:
    """The other steps (all but those of two domains for a prepared file, which keeps its item ids)."""
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
    users, left = np.unique(user), len(item) + 1
    counts["events_of_rare_items"] = 0
    while len(item) < left:  # until both minima hold
        left = len(item)
        common = np.bincount(item)[item] >= options.min_events_per_item
        counts["events_of_rare_items"] += int((~common).sum())
        user, item, time = user[common], item[common], time[common]
        size = np.bincount(user * 2 + (item > size_a), minlength=2 * user.max(initial=0) + 2).reshape(-1, 2)
        kept = ((size.min(axis=1) >= least) & (size.sum(axis=1) >= MIN_EVENTS))[user]
        user, item, time = user[kept], item[kept], time[kept]
    counts["users_below_minimum"] = len(users) - len(np.unique(user))
    if not (in_domain := np.bincount(item > size_a, minlength=2)).all():
        dropped = ", ".join(f"{key} {number}" for key, number in counts.items() if number) or "nothing was dropped"
        advice = f"Lower min_per_domain{' or min_events_per_item' if options.min_events_per_item > 1 else ''}"
        needs = f"users need {least} events in each domain, {MIN_EVENTS} in all ({dropped})"
        raise DataError(f"{name}: no event of {domains[in_domain.argmin()]} is left; {needs}. {advice}?")
    names, num_items = events.item_names, events.num_items
    if events.matched:
        used, item = np.unique(item, return_inverse=True)
        item, names = 1 + item, names[used - 1]
        num_items = int((used <= size_a).sum()), int((used > size_a).sum())
    offsets = np.cumsum([0, *np.unique(user, return_counts=True)[1]])
    time = time // events.per_second  # unknown times stay -1
    return Pair(name, domains, item, time, offsets, num_items, events.has_global_order, counts, names, titles)
