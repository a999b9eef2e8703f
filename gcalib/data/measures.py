"""What the order of events holds: mixing of the domains, ties within a day, and where the future leaks.

All functions take a pair with a common clock, return a dict of plain numbers (shares are from 0 to 1, ages in days),
and raise `DataError` for a pair without one.
"""

from __future__ import annotations

import numpy as np

from gcalib.data.pair import Pair
from gcalib.data.split import MIN_IN_DOMAIN, TARGET, streams, to_end

DAY = 86_400  # seconds


def mixing(pair: Pair) -> dict[str, float]:
    """How the two domains interleave, and how fresh each is when the test target is due.

    Returns
    -------
    dict
        `switches`, the share of neighbouring events in different domains; `switches_at_random`, its expectation if
        each user's events came in random order, `2 n_A n_B / (n (n - 1))` a neighbourhood; `own_age_days` and
        `other_age_days`, the median age of the newest event before the test target in the target's domain and in the
        other one.
    """
    pair.require_clock("The mixing of domains")
    owner, domain = _owner(pair), pair.domain_of(pair.items)
    inside = owner[1:] == owner[:-1]
    a, b = (np.bincount(owner[domain == d], minlength=pair.num_users) for d in (0, 1))
    return {
        "switches": float((domain[1:] != domain[:-1])[inside].mean()),
        "switches_at_random": float((2 * a * b / (a + b)).sum() / inside.sum()),
        "own_age_days": _age_of_newest(pair, own=True),
        "other_age_days": _age_of_newest(pair, own=False),
    }


def _age_of_newest(pair: Pair, own: bool) -> float:
    event, target = np.arange(len(pair.items)), np.repeat(pair.offsets[1:] - 1, pair.lengths)
    domain = pair.domain_of(pair.items)
    usable = (event < target) & ((domain == domain[target]) == own)
    newest = np.full(pair.num_users, -1)
    np.maximum.at(newest, _owner(pair)[usable], event[usable])
    has = newest >= 0
    ages = pair.times[pair.offsets[1:] - 1][has] - pair.times[newest[has]]
    return float(np.median(ages)) / DAY if has.any() else float("nan")


def tied_targets(pair: Pair) -> dict[str, float]:
    """What the order within a day tells of the test target; depends on `ties`.

    Returns
    -------
    dict
        `target_in_b`; of targets on the day of the event before, the shares with a larger id than that event
        (`tied_larger_id`) and of A after an event of B (`tied_a_after_b`); of targets on a later day but in the
        domain of the event before, the share with a larger id (`untied_larger_id`).
    """
    pair.require_clock("What ties tell")
    target = pair.split("test").stops
    tied = pair.times[target] == pair.times[target - 1]
    new, last = pair.items[target], pair.items[target - 1]
    same = pair.domain_of(new) == pair.domain_of(last)
    return {
        "target_in_b": _share(pair.domain_of(new) == 1),
        "tied_larger_id": _share((new > last)[tied]),
        "tied_a_after_b": _share((pair.domain_of(new) < pair.domain_of(last))[tied]),
        "untied_larger_id": _share((new > last)[~tied & same]),
    }


def later_context(pair: Pair) -> dict[str, float]:
    """How far the future would leak if the last event of A were predicted from B, as without a common clock.

    The last event of B is held out as well, as B's own test target, and so is no context (`gcalib.data.split`).

    Returns
    -------
    dict
        `users_affected`, the share of users with context of B from a later day than the target; `later_share`, the
        share of all context that is later; `same_day_share`, that on the target's day; `days_ahead`, the median lead
        of the later context.
    """
    pair.require_clock("Measuring what comes later")
    owner, in_b = _owner(pair), pair.domain_of(pair.items) == 1
    target_time = np.full(pair.num_users, np.iinfo(np.int64).min)
    np.maximum.at(target_time, owner[~in_b], pair.times[~in_b])
    place, size = to_end(streams(pair.items, pair.offsets, pair.num_items[0], has_clock=False))
    context = in_b & (target_time[owner] >= 0) & ~((place == TARGET["test"]) & (size >= MIN_IN_DOMAIN))
    lead, users = pair.times[context] - target_time[owner[context]], owner[context]
    affected = np.unique(users[lead > 0])
    return {
        "users_affected": len(affected) / pair.num_users,
        "later_share": _share(lead > 0),
        "same_day_share": _share(lead == 0),
        "days_ahead": float(np.median(lead[lead > 0])) / DAY if len(affected) else float("nan"),
    }


def later_training(pair: Pair) -> dict[str, float]:
    """How much of training is later than the test targets, as leave-one-out allows (Ji et al., TOIS 2023).

    Returns
    -------
    dict
        `training_later`, the share of training events later than a test target, averaged over targets;
        `seen_only_later`, of the targets that occur in training, the share that does so on later days only.
    """
    pair.require_clock("How much of training is later")
    test, training = pair.split("test"), pair.split("val")
    event = np.arange(len(pair.items)) < np.repeat(training.stops, pair.lengths)
    first = np.full(1 + sum(pair.num_items), np.iinfo(np.int64).max)
    np.minimum.at(first, pair.items[event], pair.times[event])
    times, seen = pair.times[test.stops], ~pair.unseen_targets("test")
    not_later = np.searchsorted(np.sort(pair.times[event]), times, side="right") / event.sum()
    return {
        "training_later": float(1 - not_later.mean()),
        "seen_only_later": _share((first[test.targets] > times)[seen]),
    }


def _owner(pair: Pair) -> np.ndarray:
    return np.repeat(np.arange(pair.num_users), pair.lengths)


def _share(chosen: np.ndarray) -> float:
    return float(chosen.mean()) if len(chosen) else float("nan")
